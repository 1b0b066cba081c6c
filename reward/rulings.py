"""Following what operators decide (:mod:`reward.decisions`), and what that says to those who rated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.fold import as_standing, fold
from feedback.tables import Episode, Feedback
from infra.events import AnswerExcluded, ProbeJudged, RaterRuled, RewardUpdated, SignalSetAside
from infra.log import outbox
from infra.log.outbox import Entry
from reward import history, store
from reward.kinds import EXPLICIT
from reward.learner import Book, Change, Learner
from reward.observations import reason_against
from reward.raters import Rater
from reward.signals import verdict_of_gold, why
from reward.tables import GoldProbe

if TYPE_CHECKING:
    from reward.worker import RewardWorker


def take_out(worker: RewardWorker, session: Session, event: AnswerExcluded) -> None:
    """Take out what was learned from an answer, operators' judgements included; say so to those who rated it.

    To the owner of a deleted answer there is nothing to say: their signals are withdrawn already.
    """
    about = sa.or_(Feedback.episode_id == event.episode_id, Feedback.over == event.episode_id)
    said = session.execute(sa.select(Feedback.id, Feedback.episode_id).where(about).order_by(Feedback.seq)).all()
    ids = [*(row.id for row in said), *store.probes_about(session, [event.episode_id])]
    for change in history.latest_of(session, worker.encoder.name, ids).values():
        worker.note(worker.learner.withdraw(change))
    if event.by == "owner":
        return
    reason = "answer_excluded"
    reports = [SignalSetAside(feedback_id=row.id, episode_id=row.episode_id, reason=reason) for row in said]
    outbox.append_many(session, [Entry(report, report.episode_id) for report in reports])


def follow(learner: Learner, event: RaterRuled, book: Book) -> list[Change]:
    """Apply a decision; return the changes of the posterior."""
    known = learner.raters.by_name
    names = [event.rater] if event.rater else [r.name for r in known.values() if r.quarantine == event.quarantine]
    return learner.rule(names, event.ruling, book)


def judge(worker: RewardWorker, session: Session, event: ProbeJudged) -> None:
    """Learn a gold probe, and hold what was said of the same thing against it."""
    episodes = [session.get(Episode, name) for name in (event.episode_id, event.over) if name is not None]
    if any(episode is None or reason_against(episode) is not None for episode in episodes):
        return  # forgotten or excluded in the meantime
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
