"""The reward worker: learns from each signal as it comes off Kafka.

An episode is featurised and scored when it is recorded; a signal moves the posterior and the score of its
episode. The updates, the scores, the events about them and the consumer's position commit together.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from feedback import erasure
from feedback.fold import Standing, fold, histories
from feedback.tables import Episode
from infra.db import Sessions, connect
from infra.events import EpisodeRecorded, FeedbackGiven, RewardUpdated, SignalSetAside, UserForgotten
from infra.log import outbox
from infra.log.consumer import Consumer, Delivery
from infra.log.outbox import Entry
from infra.process import run_until_stopped
from infra.settings import Settings, load
from reward import store
from reward.encoder import Encoder
from reward.observations import LEARNED_KINDS, observation, reason_against
from reward.online import Score, Site
from reward.store import Posterior
from reward.tables import RewardUpdate

log = logging.getLogger("everloop.reward")

CONSUMER = "reward"
# Features of a new answer cost 0.1 s and more: a large batch would keep the signals behind it waiting.
BATCH_EVENTS = 64

Features = Mapping[str, NDArray[np.float64]]


class RewardWorker:
    """Keeps the posterior in memory, in step with the database.

    Parameters
    ----------
    encoder
        Features of answers; only used on cache misses.
    """

    def __init__(self, sessions: Sessions, settings: Settings, encoder: Encoder) -> None:
        self.sessions = sessions
        self.encoder = encoder
        self.snapshot_every = settings.reward_snapshot_every
        self._posterior: Posterior | None = None
        self._last_seq = 0
        self._since_snapshot = 0
        self._unwritten: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Drop the state in memory; the next event recovers it from the database."""
        self._posterior = None
        self._since_snapshot = 0
        self._unwritten = []

    def posterior(self, session: Session) -> Posterior:
        """Return the posterior, recovered from the database where memory has none."""
        if self._posterior is None:
            self._posterior = store.load_posterior(session, self.encoder.name, self.encoder.dim)
            self._last_seq = store.last_update_seq(session)
        return self._posterior

    def on_episodes(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Featurise and score new answers."""
        learnable = [d.event.episode_id for d in deliveries if d.event.learn and d.event.answer]
        answers = session.scalars(sa.select(Episode).where(Episode.id.in_(learnable), Episode.answer != "")).all()
        if not answers:
            return
        phi = self._features(session, [(answer, answer.answer) for answer in answers])
        posterior = self.posterior(session)
        scores = posterior.head.predict_many(np.stack([phi[_digest(a, a.answer)] for a in answers]))
        store.save_scores(
            session,
            {a.id: (s, posterior.update_seq) for a, s in zip(answers, scores, strict=True)},
            self.encoder.name,
        )

    def on_feedback(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Learn from signals: take out those that they supersede, add their own, score again."""
        Signals(self, session, [delivery.event for delivery in deliveries]).learn()
        self._write_updates(session)
        self._snapshot_if_due(session)

    def on_forgotten(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Take out what forgotten users taught, and erase what was kept of their answers."""
        for event in (delivery.event for delivery in deliveries):
            episode_ids, signal_ids = erasure.concerned(session, event.tombstone)
            posterior = self.posterior(session)
            updates = store.standing_updates(session, self.encoder.name, signal_ids)
            for update in sorted(updates.values(), key=lambda update: update.seq):
                self.remove(session, update)
            self._write_updates(session)
            self._take_out_of_others(session, signal_ids)
            # What recovery would replay must not need the vectors that are emptied now.
            store.save_snapshot(session, posterior, self.encoder.name)
            self._since_snapshot = 0
            found = store.erase(session, episode_ids, signal_ids)
            erasure.report(session, event.erasure_id, "reward", {"sites_removed": len(updates), **found})

    def _take_out_of_others(self, session: Session, signal_ids: Sequence[str]) -> None:
        """Do the same for encoders that were used before and may be again."""
        for encoder in store.encoders_of(session, signal_ids):
            if encoder != self.encoder.name:
                updates = store.standing_updates(session, encoder, signal_ids)
                if updates:
                    ordered = sorted(updates.values(), key=lambda update: update.seq)
                    self._last_seq = store.take_out(session, encoder, ordered, self._last_seq)

    def add(
        self, session: Session, feedback_id: str, z: NDArray[np.float64], target: float, weight: float
    ) -> tuple[Score, Score]:
        """Learn one observation; return the score of ``z`` before and after."""
        site, before, after = self.posterior(session).head.learn_scored(z, target, weight)
        self._note(session, "add", feedback_id, site, before.p_good)
        return before, after

    def remove(self, session: Session, update: RewardUpdate) -> None:
        """Take an earlier update out again."""
        site = store.site_of(update)
        self.posterior(session).head.unlearn_one(site)
        self._note(session, "remove", update.feedback_id, site, None)

    def _note(self, session: Session, action: str, feedback_id: str, site: Site, p_before: float | None) -> None:
        posterior = self.posterior(session)
        self._last_seq += 1  # one worker at a time: nobody else counts
        self._unwritten.append(
            {
                "seq": self._last_seq,
                "feedback_id": feedback_id,
                "action": action,
                "encoder": self.encoder.name,
                "z": site.z.tobytes(),
                "precision": site.precision,
                "target": site.target,
                "p_before": p_before,
            }
        )
        posterior.update_seq = self._last_seq
        posterior.num_signals += 1 if action == "add" else -1
        self._since_snapshot += 1

    def _write_updates(self, session: Session) -> None:
        if self._unwritten:
            session.execute(sa.insert(RewardUpdate), self._unwritten)
            self._unwritten = []

    def _snapshot_if_due(self, session: Session) -> None:
        if self._since_snapshot >= self.snapshot_every:
            store.save_snapshot(session, self.posterior(session), self.encoder.name)
            self._since_snapshot = 0

    def _features(self, session: Session, answers: Sequence[tuple[Episode, str]]) -> Features:
        """Return features by digest, computing (and caching) those that are missing."""
        wanted = {_digest(episode, text): (episode, text) for episode, text in answers}
        cached = store.cached_features(session, self.encoder.name, wanted)
        missing = [digest for digest in wanted if digest not in cached]
        if missing:
            fresh = self.encoder.encode([(wanted[d][0].messages, wanted[d][1]) for d in missing])
            rows = {d: (phi, wanted[d][0].id) for d, phi in zip(missing, fresh, strict=True)}
            store.cache_features(session, self.encoder.name, rows)
            cached |= {digest: phi.astype(np.float64) for digest, (phi, _) in rows.items()}
        return cached


class Signals:
    """A batch of signals on its way into the posterior; what it needs is read once for all of them."""

    def __init__(self, worker: RewardWorker, session: Session, events: Sequence[FeedbackGiven]) -> None:
        self.worker = worker
        self.session = session
        self.events = events
        named = {e.episode_id for e in events} | {e.over for e in events if e.over}
        rows = session.scalars(sa.select(Episode).where(Episode.id.in_(named)))
        self.episodes = {row.id: row for row in rows}
        self.histories = histories(session, {event.slot for event in events})
        ids = [signal.feedback_id for history in self.histories.values() for signal in history]
        self.standing = store.standing_updates(session, worker.encoder.name, ids)
        learned = [event for event in events if self._refusal(event) is None]
        self.features = worker._features(session, [pair for event in learned for pair in self._answers(event)])
        self.scores: dict[str, tuple[Score, int]] = {}

    def learn(self) -> None:
        """Apply the signals in their order, and report each."""
        entries = [Entry(self._apply(event), event.episode_id) for event in self.events]
        store.save_scores(self.session, self.scores, self.worker.encoder.name)
        outbox.append_many(self.session, entries)

    def _refusal(self, event: FeedbackGiven) -> str | None:
        if event.kind not in LEARNED_KINDS:
            return "kind_not_learned"
        concerned = [self.episodes.get(event.episode_id), *([self.episodes.get(event.over)] if event.over else [])]
        return next((reason for episode in concerned if (reason := reason_against(episode))), None)

    def _answers(self, event: FeedbackGiven) -> list[tuple[Episode, str]]:
        episode = self.episodes[event.episode_id]
        answers = [(episode, episode.answer)]
        if event.over:
            answers.append((self.episodes[event.over], self.episodes[event.over].answer))
        if event.kind == "correction" and event.text:
            answers.append((episode, event.text))
        return answers

    def _apply(self, event: FeedbackGiven) -> RewardUpdated | SignalSetAside:
        reason = self._refusal(event)
        history = self.histories.get((event.user_id, event.kind, event.slot), [])
        if reason is None:
            stands = {signal.feedback_id: signal for signal in fold(history)}
            for signal in history:
                if signal.feedback_id not in stands and (update := self.standing.pop(signal.feedback_id, None)):
                    self.worker.remove(self.session, update)
            if history and history[-1].feedback_id == event.feedback_id:
                return self._learn_one(event, stands.get(event.feedback_id))
            reason = "superseded_before_it_was_learned"
        return SignalSetAside(feedback_id=event.feedback_id, episode_id=event.episode_id, reason=reason)

    def _learn_one(self, event: FeedbackGiven, signal: Standing | None) -> RewardUpdated:
        """Add the newest signal of its slot, or nothing where it withdrew; report the answer's new score."""
        phis = [self.features[_digest(episode, text)] for episode, text in self._answers(event)]
        if signal is None:
            before = score = self._score(phis[0])
        else:
            z, target, weight = observation(signal, phis)
            if z is phis[0]:
                before, score = self.worker.add(self.session, signal.feedback_id, z, target, weight)
            else:
                before = self._score(phis[0])
                self.worker.add(self.session, signal.feedback_id, z, target, weight)
                score = self._score(phis[0])
        update_seq = self.worker.posterior(self.session).update_seq
        self.scores[event.episode_id] = (score, update_seq)
        return RewardUpdated(
            episode_id=event.episode_id,
            feedback_id=event.feedback_id,
            mean=score.mean,
            sd=score.sd,
            p_good=score.p_good,
            p_before=before.p_good,
            update_seq=update_seq,
        )

    def _score(self, phi: NDArray[np.float64]) -> Score:
        return self.worker.posterior(self.session).head.predict_one(phi)


def _digest(episode: Episode, answer: str) -> str:
    return store.answer_digest(episode.messages, answer)


def main() -> None:
    """Run the reward worker as a process."""
    os.nice(10)  # features may wait; the answer that somebody is reading may not
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    encoder = Encoder(settings.base_model_dir, settings.encoder_layer, num_threads=1)
    threading.Thread(target=encoder.load, daemon=True).start()
    worker = RewardWorker(sessions, settings, encoder)
    handlers: dict[type[Any], Any] = {
        FeedbackGiven: worker.on_feedback,
        UserForgotten: worker.on_forgotten,
        EpisodeRecorded: worker.on_episodes,
    }
    consumer = Consumer(
        CONSUMER,
        sessions,
        settings,
        handlers,
        exclusive=True,
        batch_events=BATCH_EVENTS,
        on_rollback=worker.forget,
    )
    run_until_stopped("reward", consumer.run)


if __name__ == "__main__":
    main()
