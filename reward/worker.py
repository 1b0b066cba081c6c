"""The reward worker: learns from each signal as it comes off Kafka.

An episode is featurised and scored when it is recorded; a signal moves the posterior and the score of its
episode. The update, the score, the event about it and the consumer's position commit together.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import sqlalchemy as sa
import torch
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.tables import Episode, Feedback
from infra import outbox
from infra.consumer import Consumer
from infra.db import Sessions, connect
from infra.events import EpisodeRecorded, FeedbackGiven, RewardUpdated
from infra.process import run_until_stopped
from infra.settings import Settings, load
from reward import store
from reward.encoder import Encoder, answer_digest
from reward.online import Site
from reward.store import Posterior
from reward.tables import RewardUpdate

log = logging.getLogger("everloop.reward")

CONSUMER = "reward"
# A correction says how the answer should have been, not how bad this one was: less than a vote each way.
CORRECTION_WEIGHT = 0.5


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
        self._since_snapshot = 0

    def forget(self) -> None:
        """Drop the state in memory; the next event recovers it from the database."""
        self._posterior = None
        self._since_snapshot = 0

    def posterior(self, session: Session) -> Posterior:
        """Return the posterior, recovered from the database where memory has none."""
        if self._posterior is None:
            self._posterior = store.load_posterior(session, self.encoder.name, self.encoder.dim)
        return self._posterior

    def on_episode(self, session: Session, event: EpisodeRecorded, event_id: str) -> None:
        """Featurise and score a new answer."""
        if event.learn and event.answer:
            episode = episodes.get(session, event.episode_id)
            self._score(session, episode)

    def on_feedback(self, session: Session, event: FeedbackGiven, event_id: str) -> None:
        """Learn from a signal: take out the one that it supersedes, add its own, score again."""
        episode = episodes.get(session, event.episode_id)
        if not episode.learn or not episode.answer:
            return
        superseded = self._superseded(session, event)
        for update in superseded:
            self._remove(session, update)
        p_before = self._score(session, episode)
        if not self._is_newest(session, event):
            return
        for z, target, weight in self._observations(session, episode, event):
            posterior = self.posterior(session)
            site = posterior.head.learn_one(z, target, weight)
            self._note(session, "add", event.feedback_id, site, p_before)
        self._score(session, episode, feedback_id=event.feedback_id)
        if self._since_snapshot >= self.snapshot_every:
            store.save_snapshot(session, self.posterior(session), self.encoder.name)
            self._since_snapshot = 0

    def _observations(
        self, session: Session, episode: Episode, event: FeedbackGiven
    ) -> list[tuple[NDArray[np.float64], float, float]]:
        phi = self._features(session, episode, episode.answer)
        if event.kind == "thumb":
            return [] if event.value == 0 else [(phi, 1.0 if event.value == 1 else 0.0, 1.0)]
        corrected = self._features(session, episode, event.text or "")
        return [(corrected - phi, 1.0, CORRECTION_WEIGHT)]

    def _superseded(self, session: Session, event: FeedbackGiven) -> list[RewardUpdate]:
        """Return the standing updates of older signals by the same rater on this episode and kind."""
        removed = sa.select(RewardUpdate.feedback_id).where(RewardUpdate.action == "remove")
        this_seq = sa.select(Feedback.seq).where(Feedback.id == event.feedback_id).scalar_subquery()
        return list(
            session.scalars(
                sa.select(RewardUpdate)
                .join(Feedback, Feedback.id == RewardUpdate.feedback_id)
                .where(
                    Feedback.episode_id == event.episode_id,
                    Feedback.user_id == event.user_id,
                    Feedback.kind == event.kind,
                    Feedback.seq < this_seq,
                    RewardUpdate.action == "add",
                    RewardUpdate.encoder == self.encoder.name,
                    RewardUpdate.feedback_id.not_in(removed),
                )
            )
        )

    def _is_newest(self, session: Session, event: FeedbackGiven) -> bool:
        newest = session.scalar(
            sa.select(Feedback.id)
            .where(
                Feedback.episode_id == event.episode_id,
                Feedback.user_id == event.user_id,
                Feedback.kind == event.kind,
            )
            .order_by(Feedback.seq.desc())
            .limit(1)
        )
        return newest == event.feedback_id

    def _remove(self, session: Session, update: RewardUpdate) -> None:
        site = store.site_of(update)
        self.posterior(session).head.unlearn_one(site)
        self._note(session, "remove", update.feedback_id, site, None)

    def _note(self, session: Session, action: str, feedback_id: str, site: Site, p_before: float | None) -> None:
        update = RewardUpdate(
            feedback_id=feedback_id,
            action=action,
            encoder=self.encoder.name,
            z=site.z.tobytes(),
            precision=site.precision,
            target=site.target,
            p_before=p_before,
        )
        session.add(update)
        session.flush()
        posterior = self.posterior(session)
        posterior.update_seq = update.seq
        posterior.num_signals += 1 if action == "add" else -1
        self._since_snapshot += 1

    def _score(self, session: Session, episode: Episode, feedback_id: str | None = None) -> float:
        posterior = self.posterior(session)
        score = posterior.head.predict_one(self._features(session, episode, episode.answer))
        store.save_score(session, episode.id, score, posterior, self.encoder.name)
        if feedback_id is not None:
            event = RewardUpdated(
                episode_id=episode.id,
                feedback_id=feedback_id,
                mean=score.mean,
                sd=score.sd,
                p_good=score.p_good,
                update_seq=posterior.update_seq,
            )
            outbox.append(session, event, key=episode.id)
        return score.p_good

    def _features(self, session: Session, episode: Episode, answer: str) -> NDArray[np.float64]:
        digest = answer_digest(episode.messages, answer)
        phi = store.cached_features(session, self.encoder.name, digest)
        if phi is None:
            fresh = self.encoder.encode([(episode.messages, answer)])[0]
            store.cache_features(session, self.encoder.name, digest, fresh)
            phi = fresh.astype(np.float64)
        return phi


def main() -> None:
    """Run the reward worker as a process."""
    os.nice(5)  # features may wait; the answer that somebody is reading may not
    torch.set_num_threads(1)
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    worker = RewardWorker(sessions, settings, Encoder(settings.base_model_dir, settings.encoder_layer))
    consumer = Consumer(
        CONSUMER,
        sessions,
        settings,
        {EpisodeRecorded: worker.on_episode, FeedbackGiven: worker.on_feedback},
        on_rollback=worker.forget,
    )
    run_until_stopped("reward", consumer.run)


if __name__ == "__main__":
    main()
