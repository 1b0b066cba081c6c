"""Fills the feature cache under an encoder that no worker uses yet, in small transactions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import Episode
from feedback.users import TOMBSTONE
from infra.db import Sessions
from reward import store
from reward.encoder import Encoder
from reward.judged import standing_signals

BATCH_ANSWERS = 64


class Answer(NamedTuple):
    """An answer in its context, and the episode with which its features are erased."""

    messages: list[dict[str, Any]]
    text: str
    episode_id: str

    @property
    def digest(self) -> str:
        """The cache key."""
        return store.answer_digest(self.messages, self.text)


def fill(sessions: Sessions, encoder: Encoder, answers: Collection[Answer]) -> None:
    """Compute and cache the features that are missing.

    Each batch commits by itself, so a run that was killed goes on where it was. Answers that the encoder refuses,
    and those of users who were forgotten meanwhile, are left out.
    """
    wanted = {answer.digest: answer for answer in answers}
    digests = list(wanted)
    for start in range(0, len(digests), BATCH_ANSWERS):
        batch = digests[start : start + BATCH_ANSWERS]
        with sessions() as session:
            known = store.cached_features(session, encoder.name, batch)
        missing = [wanted[digest] for digest in batch if digest not in known]
        features, usable = encoder.encode_usable([(a.messages, a.text) for a in missing])
        computed = [(a, phi) for a, phi, ok in zip(missing, features, usable, strict=True) if ok]
        with sessions.begin() as session:
            present = _present(session, {answer.episode_id for answer, _ in computed})
            rows = {a.digest: (phi, a.episode_id) for a, phi in computed if a.episode_id in present}
            store.cache_features(session, encoder.name, rows)


def _present(session: Session, episode_ids: Collection[str]) -> set[str]:
    """Return the episodes that are not erased, locked: an erasure comes after these features, and finds them."""
    query = sa.select(Episode.id).where(Episode.id.in_(episode_ids), ~Episode.user_id.startswith(TOMBSTONE))
    return set(session.scalars(query.with_for_update(read=True)))


def answers_concerned(session: Session) -> list[Answer]:
    """Return the answers and corrections that standing signals say something about."""
    signals, episodes = standing_signals(session)
    answers = [Answer(episode.seen, episode.answer, episode.id) for episode in episodes.values()]
    return answers + [
        Answer(episodes[s.episode_id].seen, s.text, s.episode_id)
        for s in signals
        if s.kind == "correction" and s.text and s.episode_id in episodes
    ]
