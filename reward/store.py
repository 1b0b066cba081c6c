"""The reward model's state in the database: features, updates, snapshots, scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from infra.errors import IntegrityError
from reward.online import BayesianHead, Score, Site
from reward.tables import Features, RewardScore, RewardSnapshot, RewardUpdate


@dataclass(slots=True)
class Posterior:
    """A head, and the last update that it contains."""

    head: BayesianHead
    update_seq: int
    num_signals: int


def load_posterior(session: Session, encoder: str, dim: int) -> Posterior:
    """Recover the posterior: the newest snapshot and the updates since, in their order."""
    snapshot = session.scalars(
        sa.select(RewardSnapshot)
        .where(RewardSnapshot.encoder == encoder)
        .order_by(RewardSnapshot.update_seq.desc())
        .limit(1)
    ).one_or_none()
    posterior = read_snapshot(snapshot) if snapshot else Posterior(BayesianHead.prior(dim), 0, 0)
    updates = session.scalars(
        sa.select(RewardUpdate)
        .where(RewardUpdate.encoder == encoder, RewardUpdate.seq > posterior.update_seq)
        .order_by(RewardUpdate.seq)
    )
    for update in updates:
        replay(posterior, update)
    return posterior


def replay(posterior: Posterior, update: RewardUpdate) -> None:
    """Apply one recorded update."""
    site = site_of(update)
    if update.action == "add":
        posterior.head.apply(site)
        posterior.num_signals += 1
    else:
        posterior.head.unlearn_one(site)
        posterior.num_signals -= 1
    posterior.update_seq = update.seq


def site_of(update: RewardUpdate) -> Site:
    """Return the site that a recorded update added or removed."""
    return Site(np.frombuffer(update.z, np.float64), update.precision, update.target)


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


def cached_features(session: Session, encoder: str, digest: str) -> NDArray[np.float64] | None:
    """Return the cached features of an answer, shape ``(dim,)``, or None."""
    row = session.get(Features, (encoder, digest))
    return None if row is None else np.frombuffer(row.phi, np.float32).astype(np.float64)


def cache_features(session: Session, encoder: str, digest: str, phi: NDArray[np.float32]) -> None:
    """Keep the features of an answer."""
    session.execute(
        insert(Features)
        .values(encoder=encoder, answer_digest=digest, phi=phi.astype(np.float32).tobytes())
        .on_conflict_do_nothing()
    )


def save_score(session: Session, episode_id: str, score: Score, posterior: Posterior, encoder: str) -> None:
    """Write the newest score of an episode."""
    values = {
        "mean": score.mean,
        "sd": score.sd,
        "p_good": score.p_good,
        "update_seq": posterior.update_seq,
        "encoder": encoder,
    }
    session.execute(
        insert(RewardScore)
        .values(episode_id=episode_id, **values)
        .on_conflict_do_update(index_elements=["episode_id"], set_={**values, "updated_at": sa.func.now()})
    )
