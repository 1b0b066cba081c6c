"""The reward worker: learns from each signal as it comes off Kafka.

An episode is featurised and scored when it is recorded; a signal moves the posterior and the score of its
episode. The updates, the scores, the events about them, the guards and the consumer's position commit together.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from feedback import erasure
from feedback.signals import MACHINE_KINDS
from feedback.tables import Episode, User
from infra.db import Sessions, connect, transaction
from infra.errors import EverloopError
from infra.events import (
    AnswerExcluded,
    EpisodeRecorded,
    FeedbackGiven,
    ProbeJudged,
    RaterRuled,
    RebuildRequested,
    RewardUpdated,
    SignalSetAside,
    UserForgotten,
)
from infra.log import outbox
from infra.log.consumer import Consumer, Delivery
from infra.log.outbox import Entry
from infra.process import run_until_stopped
from infra.settings import Settings, load
from reward import CONSUMER, asking, encoders, history, replay, rulings, state, store
from reward.embedding import Embedder
from reward.encoder import Encoder
from reward.history import DatabaseBook, Posterior
from reward.learner import Change, Learner
from reward.metrics import RewardCollector, note_set_aside
from reward.online import Score
from reward.raters import PROGRAM
from reward.scoring import Scorer
from reward.server import serve
from reward.signals import Signals
from reward.store import Scored

log = logging.getLogger("everloop.reward")

# Features of a new answer cost 0.1 s and more: a large batch would keep the signals behind it waiting.
BATCH_EVENTS = 64
STEP_ANSWERS = 4  # between two looks whether it is to stop: a second or two, beside a busy engine

Features = Mapping[tuple[str, str], NDArray[np.float64]]  # by episode and text


class StoppingError(Exception):
    """The process is told to stop; the batch is begun anew by the next."""


class RewardWorker:
    """Keeps the learner in memory, in step with the database.

    Parameters
    ----------
    encoder
        Features of answers; only used on cache misses. A backbone that has won takes its place (:meth:`recover`).
    num_threads
        Threads that torch may use; its own choice, if unset.
    """

    def __init__(
        self, sessions: Sessions, settings: Settings, encoder: Encoder, num_threads: int | None = None
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.encoder = encoder
        self.num_threads = num_threads
        self.is_stopping: Callable[[], bool] = lambda: False
        self._learner: Learner | None = None
        self.posterior: Posterior
        self._last_seq = 0
        self._since_snapshot = 0
        self._unwritten: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Drop the state in memory; the next event recovers it from the database."""
        self._learner = None
        self._since_snapshot = 0
        self._unwritten = []

    def take(self, learner: Learner, posterior: Posterior) -> None:
        """Go on from another state."""
        self._learner, self.posterior = learner, posterior
        self._last_seq = posterior.update_seq

    def recover(self, session: Session) -> None:
        """Have the state in memory, from the database where it is not there."""
        if self._learner is None:
            active = encoders.open_active_encoder(session, self.settings, self.num_threads)
            if active.name != self.encoder.name:  # else the one at hand may be loaded already
                self.encoder = active
            self._learner, self.posterior = state.load(session, self.encoder.name, self.encoder.dim)
            self._last_seq = history.last_seq(session)

    @property
    def learner(self) -> Learner:
        """The learner, after :meth:`recover`."""
        assert self._learner is not None
        return self._learner

    def on_episodes(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Featurise and score new answers; decide whose rating to ask for."""
        learnable = [d.event.episode_id for d in deliveries if d.event.learn and d.event.answer.strip()]
        answers = session.scalars(
            sa.select(Episode).where(Episode.id.in_(learnable), Episode.answer != "").order_by(Episode.id)
        ).all()
        if not answers:
            return
        self.recover(session)
        phi = self.features(session, [(answer, answer.answer) for answer in answers])
        found = self.learner.head.predict_many(np.stack([phi[a.id, a.answer] for a in answers]))
        scores = {answer.id: score for answer, score in zip(answers, found, strict=True)}
        names = self.rater_names(session, {(answer.user_id, "thumb") for answer in answers})
        raters = {user: name for (user, _), name in names.items()}
        asking.note_answers(session, self.learner, answers, scores, raters, self.settings)
        store.save_scores(session, {i: self.scored(score) for i, score in scores.items()}, self.encoder.name)
        for score in scores.values():
            self.learner.note_usual(score.sd)
        self.commit(session)

    def on_feedback(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Learn from signals: take out those that they supersede, add their own, score again."""
        self.recover(session)
        Signals(self, session, [delivery.event for delivery in deliveries]).learn()
        self.commit(session)

    def on_probes(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Learn what an operator judged, and hold raters against it."""
        self.recover(session)
        for event in (delivery.event for delivery in deliveries):
            rulings.judge(self, session, event)
        self.commit(session)

    def on_exclusions(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Take out what was learned from answers that an operator excluded."""
        self.recover(session)
        for event in (delivery.event for delivery in deliveries):
            rulings.take_out(self, session, event)
        self.commit(session)

    def on_rulings(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Take out, or in, what raters said of whom an operator decided."""
        self.recover(session)
        for event in (delivery.event for delivery in deliveries):
            changes = rulings.follow(self.learner, event, self.book(session))
            self.report(session, changes)
        self.commit(session)

    def on_rebuild(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Learn everything anew from the log."""
        for _ in deliveries:
            self.forget()  # the active encoder may be another now
            replay.rebuild(self, session)

    def on_forgotten(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Take out what forgotten users taught, and erase what was kept of their answers."""
        self.recover(session)
        for event in (delivery.event for delivery in deliveries):
            episode_ids, signal_ids = erasure.concerned(session, event.tombstone)
            # What operators judged of their answers is made of those answers.
            signal_ids += store.probes_about(session, episode_ids)
            changes = history.latest_of(session, self.encoder.name, signal_ids)
            taken = [self.learner.withdraw(change) for change in changes.values()]
            for change in taken:
                self.note(change)
            self.flush(session)
            self._take_out_of_others(session, signal_ids)
            encoders.retire_taught_by(session, self.settings, signal_ids)
            key = session.scalar(sa.select(User.key_id).where(User.user_id == event.tombstone))
            if key in self.learner.raters.by_name:
                self.learner.raters.get(key).block = None
            # What recovery would replay must not need the vectors that are emptied now.
            store.save_snapshot(session, self.posterior, self.encoder.name)
            self._since_snapshot = 0
            found = store.erase(session, episode_ids, signal_ids)
            erasure.report(session, event.erasure_id, "reward", {"sites_removed": len(taken), **found})
        self.commit(session)

    def _take_out_of_others(self, session: Session, signal_ids: Sequence[str]) -> None:
        """Do the same for encoders that were used before and may be again."""
        for encoder in store.encoders_of(session, signal_ids):
            if encoder != self.encoder.name:
                changes = history.latest_of(session, encoder, signal_ids)
                if changes:
                    self._last_seq = store.take_out(session, encoder, list(changes.values()), self._last_seq)

    def book(self, session: Session) -> DatabaseBook:
        """Return where the learner finds what raters said."""
        return DatabaseBook(session, self.encoder.name, lambda: self.flush(session))

    def note(self, change: Change) -> None:
        """Keep a change of the posterior, to be written with the others."""
        self._last_seq += 1  # one worker at a time: nobody else counts
        self._unwritten.append(history.row_of(change, self.encoder.name, self._last_seq))
        self.posterior.count(change, self._last_seq)
        self._since_snapshot += 1

    def scored(self, score: Score, p_self: float | None = None) -> Scored:
        """Return a score as it is stored: calibrated, with the update that it contains."""
        p_good = self.learner.p_good(score, p_self)
        return Scored(score.mean, score.sd, p_good, self.learner.abstains(score), self.posterior.update_seq)

    def updated(
        self,
        episode_id: str,
        feedback_id: str,
        scored: Scored,
        weight: float | None,
        p_before: float | None = None,
    ) -> RewardUpdated:
        """Return the report of a signal that was learned (or withdrawn)."""
        return RewardUpdated(
            episode_id=episode_id,
            feedback_id=feedback_id,
            mean=scored.mean,
            sd=scored.sd,
            p_good=scored.p_good,
            p_before=p_before,
            abstain=scored.abstain,
            weight=weight,
            encoder=self.encoder.name,
            update_seq=scored.update_seq,
        )

    def rater_names(self, session: Session, who: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Return the rater's name by (user, kind of signal): a person's key's id, or what a program goes by.

        A program may bear a person's name; what it says is not theirs.
        """
        people = {user for user, kind in who if kind not in MACHINE_KINDS}
        rows = session.execute(sa.select(User.user_id, User.key_id).where(User.user_id.in_(people)))
        keys = {user: key for user, key in rows}  # noqa: C416
        names = {pair: PROGRAM + pair[0] if pair[1] in MACHINE_KINDS else keys.get(pair[0]) for pair in who}
        return {pair: name for pair, name in names.items() if name is not None}

    def report(self, session: Session, changes: Sequence[Change]) -> None:
        """Keep changes that nobody waits for, and say what became of their signals."""
        for change in changes:
            self.note(change)
        reports = self.report_settled(session, changes)
        note_set_aside(session, reports)
        outbox.append_many(session, [Entry(report, report.episode_id) for report in reports])

    def report_settled(self, session: Session, changes: Sequence[Change]) -> list[RewardUpdated | SignalSetAside]:
        """Return what there is to say of signals that were taken out, or in, with their raters."""
        return rulings.settled(self, session, changes)

    def features(self, session: Session, answers: Sequence[tuple[Episode, str]]) -> Features:
        """Return features by episode and text, computing (and caching) those that are missing."""
        digests = {(episode.id, text): store.digest_of(episode, text) for episode, text in answers}
        wanted = {digests[episode.id, text]: (episode, text) for episode, text in answers}
        cached = store.cached_features(session, self.encoder.name, wanted)
        # By length, so that what is computed together needs little padding.
        missing = sorted((d for d in wanted if d not in cached), key=lambda digest: len(wanted[digest][1]))
        for start in range(0, len(missing), STEP_ANSWERS):
            if self.is_stopping():
                raise StoppingError("told to stop; nothing of this batch is kept")
            step = missing[start : start + STEP_ANSWERS]
            fresh = self.encoder.encode([(wanted[d][0].seen, wanted[d][1]) for d in step])
            rows = {d: (phi, wanted[d][0].id) for d, phi in zip(step, fresh, strict=True)}
            store.cache_features(session, self.encoder.name, rows)
            cached |= {digest: phi.astype(np.float64) for digest, (phi, _) in rows.items()}
        return {key: cached[digest] for key, digest in digests.items()}

    def commit(self, session: Session) -> None:
        """Write what changed in memory, within the caller's transaction."""
        self.flush(session)
        if self._since_snapshot >= self.settings.reward_snapshot_every:
            store.save_snapshot(session, self.posterior, self.encoder.name)
            self._since_snapshot = 0
        state.save(session, self.learner, self.posterior, self.encoder.name)

    def flush(self, session: Session) -> None:
        """Write the history of what was changed so far."""
        history.write(session, self._unwritten)
        self._unwritten = []


def _load_or_exit(encoder: Encoder, embedder: Embedder | None) -> None:
    """Load the models; without one that can be trusted, signals have to wait and not become dead letters."""
    try:
        encoder.load()
    except Exception:
        log.exception("the encoder cannot be loaded")
        os._exit(1)
    if embedder is not None:
        try:
            embedder.load()  # before the first question comes
        except EverloopError:
            log.exception("memory's encoder cannot be loaded: words find what was said")


def main() -> None:
    """Run the reward worker as a process."""
    os.nice(10)  # features may wait; the answer that somebody is reading may not
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    with transaction(sessions) as session:
        encoder = encoders.open_active_encoder(session, settings, num_threads=1)
    embedder = Embedder(settings, num_threads=1)
    for_memory = embedder if settings.memory_encoder != "off" else None
    threading.Thread(target=_load_or_exit, args=[encoder, for_memory], daemon=True).start()
    worker = RewardWorker(sessions, settings, encoder, num_threads=1)
    if settings.reward_port is not None:
        serve(
            Scorer(sessions, lambda: worker.encoder, settings.pessimism_kappa),
            embedder,
            settings.reward_host,
            settings.reward_port,
        )
    handlers: dict[type[Any], Any] = {
        RaterRuled: worker.on_rulings,
        FeedbackGiven: worker.on_feedback,
        ProbeJudged: worker.on_probes,
        AnswerExcluded: worker.on_exclusions,
        UserForgotten: worker.on_forgotten,
        RebuildRequested: worker.on_rebuild,
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

    def run(stop: threading.Event) -> None:
        worker.is_stopping = stop.is_set
        consumer.run(stop)

    run_until_stopped("reward", run, settings, RewardCollector(sessions))


if __name__ == "__main__":
    main()
