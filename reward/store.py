"""The reward model's state in the database: features, updates, snapshots, scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import Episode
from infra.db import ManyRows, among
from infra.errors import IntegrityError
from reward import history
from reward.history import Posterior
from reward.learner import Change, Guards, Learner
from reward.online import BayesianHead
from reward.tables import (
    Features,
    GoldProbe,
    RatingChoice,
    RewardScore,
    RewardSnapshot,
    RewardUpdate,
    Solicitation,
)

LOAD_TRIES = 5


def load_posterior(session: Session, encoder: str, dim: int, known: Posterior | None = None) -> Posterior:
    """Recover the posterior: the newest snapshot and the updates since, in their order.

    Parameters
    ----------
    known
        An earlier state, which is brought up to date where that is less work.
    """
    for _ in range(LOAD_TRIES):
        found = _load(session, encoder, dim, known)
        if found is not None:
            return found
    raise IntegrityError(
        f"Updates of {encoder} were erased and no snapshot stands for them.", code="reward_updates_erased"
    )


def _load(session: Session, encoder: str, dim: int, known: Posterior | None) -> Posterior | None:
    """Recover the posterior; None where an erasure emptied updates after the snapshot had been read."""
    snapshot = session.scalars(
        sa.select(RewardSnapshot)
        .where(RewardSnapshot.encoder == encoder)
        .order_by(RewardSnapshot.update_seq.desc())
        .limit(1)
    ).one_or_none()
    # A snapshot that is newer than what is known may have put something else in its place (a rebuild, an erasure).
    if known is not None and (snapshot is None or snapshot.update_seq <= known.update_seq):
        posterior = known
    else:
        posterior = read_snapshot(snapshot) if snapshot else Posterior(BayesianHead.prior(dim), 0, 0)
    updates = session.scalars(
        sa.select(RewardUpdate)
        .where(RewardUpdate.encoder == encoder, RewardUpdate.seq > posterior.update_seq)
        .order_by(RewardUpdate.seq)
    )
    for update in updates:
        if not update.z and update.action != "inflate":
            return None
        posterior.replay(update)
    return posterior


def read_snapshot(snapshot: RewardSnapshot) -> Posterior:
    """Return the posterior of a snapshot, after checking its digest.

    Raises
    ------
    IntegrityError
        Code ``reward_snapshot_corrupt``.
    """
    theta = np.frombuffer(snapshot.theta, np.float64)
    covariance = np.frombuffer(snapshot.covariance, np.float64).reshape(len(theta), len(theta))
    head = BayesianHead(theta, covariance)
    if head.digest() != snapshot.digest:
        raise IntegrityError(
            f"Reward snapshot {snapshot.id} does not match its digest.", code="reward_snapshot_corrupt"
        )
    return Posterior(head, snapshot.update_seq, snapshot.num_signals)


def save_snapshot(session: Session, posterior: Posterior, encoder: str) -> int:
    """Write a snapshot of the posterior (once per update) and return its id."""
    head = posterior.head
    session.execute(
        insert(RewardSnapshot)
        .values(
            encoder=encoder,
            update_seq=posterior.update_seq,
            theta=head.theta.tobytes(),
            covariance=np.ascontiguousarray(head.covariance).tobytes(),
            num_signals=posterior.num_signals,
            digest=head.digest(),
        )
        .on_conflict_do_nothing()
    )
    return session.scalars(
        sa.select(RewardSnapshot.id).where(
            RewardSnapshot.encoder == encoder, RewardSnapshot.update_seq == posterior.update_seq
        )
    ).one()


def pin_snapshot(session: Session, encoder: str, dim: int) -> tuple[int, BayesianHead]:
    """Freeze the posterior as it is now; return the snapshot's id and its head."""
    posterior = load_posterior(session, encoder, dim)
    return save_snapshot(session, posterior, encoder), posterior.head


def answer_digest(messages: Sequence[Mapping[str, Any]], answer: str) -> str:
    """Return the cache key of an answer in its context."""
    return hashlib.sha256(json.dumps([list(messages), answer], sort_keys=True).encode()).hexdigest()


def digest_of(episode: Episode, answer: str) -> str:
    """Return the cache key of an answer to what an episode was asked."""
    return answer_digest(episode.seen, answer)


def cached_features(session: Session, encoder: str, digests: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Return the cached features of answers, shape ``(dim,)`` each, of those that are cached."""
    rows = session.execute(
        sa.select(Features.answer_digest, Features.phi).where(
            Features.encoder == encoder, among(Features.answer_digest, digests)
        )
    )
    return {digest: np.frombuffer(phi, np.float32).astype(np.float64) for digest, phi in rows}


def cache_features(session: Session, encoder: str, features: Mapping[str, tuple[NDArray[np.float32], str]]) -> None:
    """Keep the features of answers: by digest, the vector and the episode that it was computed for."""
    if features:
        rows = [
            {"encoder": encoder, "answer_digest": digest, "phi": phi.tobytes(), "episode_id": episode_id}
            for digest, (phi, episode_id) in features.items()
        ]
        session.execute(insert(Features).on_conflict_do_nothing(), rows)


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer's newest score, and the update after which it was computed."""

    mean: float
    sd: float
    p_good: float
    abstain: bool
    update_seq: int


def save_scores(session: Session, scores: Mapping[str, Scored], encoder: str) -> None:
    """Write the newest score of each episode."""
    rows = [
        {"episode_id": episode_id, "encoder": encoder, **{name: getattr(score, name) for name in Scored.__slots__}}
        for episode_id, score in scores.items()
    ]
    _SCORES.write(session, rows)


_SCORES = ManyRows(
    "reward_scores",
    {
        "episode_id": "text",
        "encoder": "text",
        "mean": "float8",
        "sd": "float8",
        "p_good": "float8",
        "abstain": "bool",
        "update_seq": "bigint",
    },
    key="episode_id",
    stamp="updated_at",
)


def take_out(session: Session, encoder: str, changes: Sequence[Change], last_seq: int) -> int:
    """Take signals out of the posterior of an encoder that no worker holds; snapshot it; return the last seq."""
    posterior = load_posterior(session, encoder, max(len(change.z) for change in changes))
    newest = sa.select(RewardUpdate.inflation).where(RewardUpdate.encoder == encoder)
    inflation = session.scalar(newest.order_by(RewardUpdate.seq.desc()).limit(1)) or 1.0
    learner = Learner(posterior.head, Guards(inflation=inflation))
    for seq, change in enumerate(changes, last_seq + 1):
        done = learner.withdraw(change)
        posterior.count(done, seq)
        history.write(session, [history.row_of(done, encoder, seq)])
    save_snapshot(session, posterior, encoder)
    return posterior.update_seq


def encoders_of(session: Session, feedback_ids: Sequence[str]) -> list[str]:
    """Return the encoders under which these signals were learned."""
    query = sa.select(RewardUpdate.encoder).where(RewardUpdate.feedback_id.in_(feedback_ids)).distinct()
    return sorted(session.scalars(query))


def probes_about(session: Session, episode_ids: Sequence[str]) -> list[str]:
    """Return the gold probes about answers, alone or compared."""
    about = sa.or_(GoldProbe.episode_id.in_(episode_ids), GoldProbe.over.in_(episode_ids))
    return list(session.scalars(sa.select(GoldProbe.id).where(about).order_by(GoldProbe.id)))


def erase(session: Session, episode_ids: Sequence[str], feedback_ids: Sequence[str]) -> dict[str, Any]:
    """Erase features, scores and the vectors of updates; the caller has taken their effect out and snapshotted.

    Returns
    -------
    dict
        What was erased, and the snapshots that still hold the effect (numbers only).
    """
    seq = RewardUpdate.seq
    first, last = session.execute(
        sa.select(sa.func.min(seq), sa.func.max(seq)).where(RewardUpdate.feedback_id.in_(feedback_ids))
    ).one()
    for table in (RatingChoice, Solicitation):
        session.execute(sa.delete(table).where(table.episode_id.in_(episode_ids)))
    session.execute(sa.delete(GoldProbe).where(GoldProbe.id.in_(feedback_ids)))
    touched = sa.select(RewardSnapshot.id).where(RewardSnapshot.update_seq.between(first, (last or 0) - 1))
    emptied = session.execute(
        sa.update(RewardUpdate).where(RewardUpdate.feedback_id.in_(feedback_ids)).values(z=b"")
    )
    features = session.execute(sa.delete(Features).where(Features.episode_id.in_(episode_ids)))
    scores = session.execute(sa.delete(RewardScore).where(RewardScore.episode_id.in_(episode_ids)))
    return {
        "vectors_emptied": emptied.rowcount,  # type: ignore[attr-defined]
        "features_deleted": features.rowcount,  # type: ignore[attr-defined]
        "scores_deleted": scores.rowcount,  # type: ignore[attr-defined]
        "older_snapshots": list(session.scalars(touched.order_by(RewardSnapshot.id))),
    }
