"""A batch of signals on its way into the posterior; what it needs is read once for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from feedback.fold import Standing, as_standing, fold
from feedback.tables import Episode, Feedback, SelfEvaluation
from infra.db import among
from infra.events import FeedbackGiven, RewardUpdated, SignalSetAside
from infra.log import outbox
from infra.log.outbox import Entry
from infra.telemetry import tracing
from reward import history, store
from reward.asking import note_rating
from reward.kinds import EXPLICIT, key_of, verdict_of
from reward.learner import Change, Observation
from reward.metrics import note_set_aside
from reward.observations import LEARNED_KINDS, PAIRS, observation, reason_against
from reward.online import Score
from reward.raters import Rater
from reward.store import Scored
from reward.tables import GoldProbe, RatingChoice, Solicitation

if TYPE_CHECKING:
    from reward.worker import RewardWorker

Vector = NDArray[np.float64]
BY_CHOICE = frozenset({"thumb", "rating"})


def answers_of(signal: Standing | FeedbackGiven, episodes: Mapping[str, Episode]) -> list[tuple[Episode, str]]:
    """Return the texts that a signal is about: the answer, and the one that it is compared with, if any."""
    episode = episodes[signal.episode_id]
    answers = [(episode, episode.answer)]
    if signal.over:
        answers.append((episodes[signal.over], episodes[signal.over].answer))
    if signal.kind == "correction" and signal.text:
        answers.append((episode, signal.text))
    return answers


def refusal(kind: str, concerned: Iterable[Episode | None]) -> str | None:
    """Return why a signal is not learned from, as a stable key, or None."""
    if kind not in LEARNED_KINDS:
        return "kind_not_learned"
    return next((reason for episode in concerned if (reason := reason_against(episode))), None)


def verdict_of_gold(probes: Iterable[GoldProbe], signal: Standing) -> bool | None:
    """Return whether a signal agrees with a gold probe about the same thing; None where there is none."""
    verdict = verdict_of(signal)
    if signal.kind not in EXPLICIT or verdict is None or verdict == 0.5:
        return None
    for probe in probes:
        if (probe.episode_id, probe.over) == (signal.episode_id, signal.over):
            return (verdict > 0.5) == probe.good
        if signal.over and (probe.over, probe.episode_id) == (signal.episode_id, signal.over):
            return not probe.good
    return None


class Signals:
    """Signals that came together.

    Parameters
    ----------
    known_dead
        Whether texts of which no features can be made are set aside. A rebuild does so: they became dead letters
        when they came.
    """

    def __init__(
        self, worker: RewardWorker, session: Session, events: Sequence[FeedbackGiven], *, known_dead: bool = False
    ) -> None:
        self.known_dead = known_dead
        self.worker = worker
        self.session = session
        self.events = events
        named = {e.episode_id for e in events} | {e.over for e in events if e.over}
        self.episodes = {row.id: row for row in session.scalars(sa.select(Episode).where(among(Episode.id, named)))}
        self._read_signals(named)
        self.raters = worker.rater_names(session, {(s.user_id, s.kind) for s in self.by_id.values()})
        standing = {id_: s for id_, s in self.by_id.items() if self._refusal(s) is None}
        learned = [standing[e.feedback_id] for e in events if e.feedback_id in standing]
        self.features = worker.features(session, [pair for s in learned for pair in answers_of(s, self.episodes)])
        choices = session.scalars(sa.select(RatingChoice).where(among(RatingChoice.episode_id, named)))
        self.choices = {choice.episode_id: choice for choice in choices}
        asked = sa.select(Solicitation.episode_id).where(among(Solicitation.episode_id, named))
        self.at_random = set(session.scalars(asked.where(Solicitation.reason == "random")))
        evaluations = sa.select(SelfEvaluation.episode_id, SelfEvaluation.p_good)
        rows = session.execute(evaluations.where(among(SelfEvaluation.episode_id, named)))
        self.evaluations = {episode_id: p_good for episode_id, p_good in rows}  # noqa: C416
        probes = sa.select(GoldProbe).where(among(GoldProbe.episode_id, named), GoldProbe.judged)
        self.probes = session.scalars(probes).all()
        self.scores: dict[str, Scored] = {}

    def _read_signals(self, named: set[str]) -> None:
        """Read all that was said in the slots of these signals, and of their answers."""
        slots = {event.slot for event in self.events}
        rows = self.session.scalars(
            sa.select(Feedback)
            .where(sa.or_(among(Feedback.slot, slots), among(Feedback.episode_id, named)))
            .order_by(Feedback.seq)
        )
        self.by_id = {row.id: as_standing(row) for row in rows}
        self.histories: dict[tuple[str, str, str], list[Standing]] = {}
        self.about: dict[str, list[Standing]] = {}
        for signal in self.by_id.values():
            self.histories.setdefault(signal.key, []).append(signal)
            self.about.setdefault(signal.episode_id, []).append(signal)
        self.latest = history.latest_of(self.session, self.worker.encoder.name, self.by_id)

    def learn(self) -> None:
        """Apply the signals in their order, and report each."""
        entries = []
        for event in self.events:
            with tracing.within(event.traceparent):  # what it causes goes on in its trace
                reports = self._apply(event)
            note_set_aside(self.session, reports)
            entries += [Entry(report, report.episode_id) for report in reports]
        store.save_scores(self.session, self.scores, self.worker.encoder.name)
        outbox.append_many(self.session, entries)

    def _refusal(self, signal: Standing | FeedbackGiven) -> str | None:
        named = [signal.episode_id, *([signal.over] if signal.over else [])]
        reason = refusal(signal.kind, [self.episodes.get(name) for name in named])
        if reason is None and self.known_dead:
            refused = (self.worker.encoder.refusal(text) for _, text in answers_of(signal, self.episodes))
            reason = next((error.code for error in refused if error is not None), None)
        return reason

    def _apply(self, event: FeedbackGiven) -> list[RewardUpdated | SignalSetAside]:
        past = self.histories.get((event.user_id, event.kind, event.slot), [])
        stands = {signal.feedback_id: signal for signal in fold(past)}
        # What no longer stands is taken out even where nothing may be learned from the answer any more.
        for signal in past:
            if signal.feedback_id not in stands and (change := self.latest.pop(signal.feedback_id, None)):
                self.worker.note(self.worker.learner.withdraw(change))
        reason = self._refusal(event)
        if reason is None:
            if past and past[-1].feedback_id == event.feedback_id:
                return self._learn_one(event, past[-1], stands=event.feedback_id in stands)
            reason = "superseded_before_it_was_learned"
        return [_set_aside(event, reason)]

    def _learn_one(
        self, event: FeedbackGiven, signal: Standing, *, stands: bool
    ) -> list[RewardUpdated | SignalSetAside]:
        """Add the newest signal of its slot, or nothing where it withdrew; report the answer's new score."""
        phis = [self.features[episode.id, text] for episode, text in answers_of(signal, self.episodes)]
        seen = observation(signal, phis) if stands else None  # a withdrawal says nothing itself
        if stands and seen is None:
            return [_set_aside(event, "says_neither_good_nor_bad")]
        if not stands or seen is None or signal.feedback_id in self.latest:
            score = self._score(phis[0])
            return [self._updated(event, score, score, None)]
        before = None if seen[0] is phis[0] else self._score(phis[0])
        observed = self._observation(event, signal, *seen)
        z_before, z_after, changes = self.worker.learner.learn(observed, self.worker.book(self.session))
        reports = self._keep(changes, but=signal.feedback_id)
        own = self.latest[signal.feedback_id]
        rater = self.worker.learner.raters.get(observed.rater)
        right = verdict_of_gold(self.probes, signal)
        if right is not None:
            book = self.worker.book(self.session)
            reports += self._keep(self.worker.learner.check(observed.rater, right=right, book=book))
        if own.action == "hold":
            return [_set_aside(event, why(rater)), *reports]
        if before is None:
            return [self._updated(event, z_before, z_after, own.weight), *reports]
        return [self._updated(event, before, self._score(phis[0]), own.weight), *reports]

    def _observation(self, event: FeedbackGiven, signal: Standing, z: Vector, target: float) -> Observation:
        learner, key = self.worker.learner, key_of(signal)
        rater = self.raters[signal.user_id, signal.kind]
        self._compare(signal)
        weight = learner.guards.kinds.weight(key)
        choice = self.choices.get(signal.episode_id)
        if signal.kind in BY_CHOICE and choice is not None:
            at_random = signal.episode_id in self.at_random
            weight *= note_rating(learner, choice, rater, target, asked_at_random=at_random)
        return Observation(
            signal.feedback_id,
            rater,
            key,
            z,
            target,
            weight,
            pair=signal.kind in PAIRS,
            p_self=self.evaluations.get(signal.episode_id),
            block=event.address_block,
            at_s=said_at_s(signal.feedback_id),
        )

    def _compare(self, signal: Standing) -> None:
        """Learn from it what its kind is worth, or another; who does not count has no say in that either."""
        # What stood then: learning anew knows also what superseded it later.
        earlier = fold(s for s in self.about[signal.episode_id] if s.seq < signal.seq)
        if self._is_heard(signal):
            self.worker.learner.guards.kinds.compare(signal, [s for s in earlier if self._is_heard(s)])

    def _is_heard(self, signal: Standing) -> bool:
        raters = self.worker.learner.raters
        rater = raters.by_name.get(self.raters.get((signal.user_id, signal.kind), ""))
        return key_of(signal) not in EXPLICIT or rater is None or raters.counts(rater)

    def _keep(self, changes: Sequence[Change], but: str | None = None) -> list[RewardUpdated | SignalSetAside]:
        """Keep changes; return what there is to say of those signals that they took out, or in."""
        for change in changes:
            self.worker.note(change)
            if change.feedback_id in self.by_id:
                self.latest[change.feedback_id] = change
        return self.worker.report_settled(self.session, [c for c in changes if c.feedback_id != but])

    def _updated(self, event: FeedbackGiven, before: Score, score: Score, weight: float | None) -> RewardUpdated:
        learner, p_self = self.worker.learner, self.evaluations.get(event.episode_id)
        scored = self.worker.scored(score, p_self)
        self.scores[event.episode_id] = scored
        p_before = learner.p_good(before, p_self)
        return self.worker.updated(event.episode_id, event.feedback_id, scored, weight, p_before)

    def _score(self, phi: Vector) -> Score:
        return self.worker.learner.head.predict_one(phi)


def said_at_s(feedback_id: str) -> float | None:
    """Return when a signal was accepted, in seconds since 1970; None for the first version's ids."""
    at_s = int(feedback_id.partition("_")[2][:12], 16) / 1000.0
    return at_s if at_s < time.time() + 86_400.0 else None


def why(rater: Rater) -> str:
    """Return why a signal is held: for its rater's sake, or for its kind's. As a stable key."""
    return rater.reason_against or "kind_says_nothing"


def _set_aside(event: FeedbackGiven, reason: str) -> SignalSetAside:
    return SignalSetAside(feedback_id=event.feedback_id, episode_id=event.episode_id, reason=reason)
