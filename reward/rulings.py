"""What operators decide: gold probes, bans, quarantines; and what that says to those who rated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.fold import as_standing, fold
from feedback.tables import Episode, Feedback
from infra.errors import NotFoundError
from infra.events import ProbeJudged, RaterRuled, RewardUpdated, SignalSetAside
from infra.ids import new_id
from infra.log import outbox
from reward import store
from reward.kinds import EXPLICIT
from reward.learner import Book, Change, Learner
from reward.raters import Rater, Ruling
from reward.signals import verdict_of_gold, why
from reward.tables import GoldProbe, RewardRater
from reward.tables import Ruling as RulingRow

if TYPE_CHECKING:
    from reward.worker import RewardWorker


def give_probe(
    session: Session, episode_id: str, *, good: bool, over: str | None = None, operator: str, reason: str
) -> str:
    """Record an operator's judgement of an answer, with its event; return the probe's id.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    for name in (episode_id, over):
        if name is not None and session.get(Episode, name) is None:
            raise NotFoundError(f"There is no episode {name!r}.", code="episode_not_found", param="episode_id")
    probe_id = new_id("go")
    session.add(
        GoldProbe(id=probe_id, episode_id=episode_id, over=over, good=good, operator=operator, reason=reason)
    )
    event = ProbeJudged(probe_id=probe_id, episode_id=episode_id, over=over, good=good)
    outbox.append(session, event, key=episode_id, event_id=probe_id)
    return probe_id


def give_ruling(
    session: Session,
    *,
    rater: str | None = None,
    quarantine: str | None = None,
    ruling: Ruling | None,
    operator: str,
    reason: str,
) -> str:
    """Record an operator's decision about a rater, or about all of a quarantine, with its event; return its id.

    Raises
    ------
    NotFoundError
        Code ``rater_not_found`` or ``quarantine_not_found``.
    """
    if rater is not None and session.get(RewardRater, rater) is None:
        raise NotFoundError(
            f"There is no rater {rater!r}; `everloop reward raters` lists them.", code="rater_not_found"
        )
    held = sa.select(RewardRater.name).where(RewardRater.quarantine == quarantine).limit(1)
    if rater is None and session.scalar(held) is None:
        raise NotFoundError(f"There is no open quarantine {quarantine!r}.", code="quarantine_not_found")
    ruling_id = new_id("ru")
    session.add(
        RulingRow(id=ruling_id, rater=rater, quarantine=quarantine, ruling=ruling, operator=operator, reason=reason)
    )
    event = RaterRuled(rater=rater, quarantine=quarantine, ruling=ruling)
    outbox.append(session, event, key=rater or str(quarantine), event_id=ruling_id)
    return ruling_id


def follow(learner: Learner, event: RaterRuled, book: Book) -> list[Change]:
    """Apply a decision; return the changes of the posterior."""
    known = learner.raters.by_name
    names = [event.rater] if event.rater else [r.name for r in known.values() if r.quarantine == event.quarantine]
    return learner.rule(names, event.ruling, book)


def judge(worker: RewardWorker, session: Session, event: ProbeJudged) -> None:
    """Learn a gold probe, and hold what was said of the same thing against it."""
    episodes = [session.get(Episode, name) for name in (event.episode_id, event.over) if name is not None]
    if any(episode is None or not episode.answer.strip() for episode in episodes):
        return  # forgotten in the meantime
    answers = [(episode, episode.answer) for episode in episodes if episode is not None]
    features = worker.features(session, answers)
    phis = [features[episode.id, text] for episode, text in answers]
    z = phis[0] - phis[1] if event.over else phis[0]
    change = worker.learner.teach(event.probe_id, z, float(event.good))
    worker.report(session, [change])
    session.execute(sa.update(GoldProbe).where(GoldProbe.id == event.probe_id).values(judged=True))
    probe = GoldProbe(episode_id=event.episode_id, over=event.over, good=event.good)
    named = [event.episode_id, *([event.over] if event.over else [])]
    rows = session.scalars(
        sa.select(Feedback)
        .where(Feedback.episode_id.in_(named), Feedback.kind.in_(EXPLICIT))
        .order_by(Feedback.seq)
    )
    signals = fold(map(as_standing, rows))
    names = worker.rater_names(session, {(signal.user_id, signal.kind) for signal in signals})
    for signal in signals:
        right = verdict_of_gold([probe], signal)
        name = names.get((signal.user_id, signal.kind))
        if right is not None and name is not None:
            worker.report(session, worker.learner.check(name, right=right, book=worker.book(session)))


def settled(
    worker: RewardWorker, session: Session, changes: Sequence[Change]
) -> list[RewardUpdated | SignalSetAside]:
    """Return what there is to say of signals that were held, or came in again."""
    moved = {change.feedback_id: change for change in changes if change.action in ("add", "hold")}
    if not moved:
        return []
    rows = session.execute(
        sa.select(Feedback, Episode)
        .join(Episode, Episode.id == Feedback.episode_id)
        .where(Feedback.id.in_(moved))
        .order_by(Feedback.seq)
    ).all()
    names = worker.rater_names(session, {(signal.user_id, signal.kind) for signal, _ in rows})
    learned = [episode for signal, episode in rows if moved[signal.id].action == "add"]
    features = worker.features(session, [(episode, episode.answer) for episode in learned])
    reports: list[RewardUpdated | SignalSetAside] = []
    scores = {}
    for signal, episode in rows:
        if moved[signal.id].action == "hold":
            rater = worker.learner.raters.by_name.get(names.get((signal.user_id, signal.kind), ""), Rater(""))
            reports.append(SignalSetAside(feedback_id=signal.id, episode_id=episode.id, reason=why(rater)))
            continue
        phi = features[episode.id, episode.answer]
        scored = scores[episode.id] = worker.scored(worker.learner.head.predict_one(phi))
        reports.append(worker.updated(episode.id, signal.id, scored, moved[signal.id].weight))
    store.save_scores(session, scores, worker.encoder.name)
    return reports
