"""The learner in the database: guards and raters beside the posterior, in step with it."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.db import ManyRows
from infra.errors import IntegrityError
from reward import store
from reward.history import Posterior
from reward.learner import Guards, Learner
from reward.raters import Rater
from reward.tables import RewardRater, RewardState

_TYPES = {
    "name": "text",
    "num_votes": "int",
    "num_right": "int",
    "num_wrong": "int",
    "set_aside": "bool",
    "ruling": "text",
    "quarantine": "text",
    "block": "text",
    "first_at_s": "float8",
    "num_seen": "int",
    "num_rated": "int",
}
_RATERS = ManyRows("reward_raters", _TYPES, key="name")


def load(session: Session, encoder: str, dim: int) -> tuple[Learner, Posterior]:
    """Recover the learner as the last committed transaction left it.

    Raises
    ------
    IntegrityError
        Code ``reward_snapshot_corrupt`` or ``reward_updates_erased`` (:mod:`reward.store`);
        ``reward_position_backwards`` where the guards have seen updates that the history does not hold.
    """
    posterior = store.load_posterior(session, encoder, dim)
    seen = session.scalar(sa.select(RewardState.update_seq).where(RewardState.encoder == encoder)) or 0
    if seen > posterior.update_seq:
        raise IntegrityError(
            f"The guards of {encoder} saw update {seen}, the history ends at {posterior.update_seq}: part of it "
            "was lost. Restore it from a backup, or run `everloop reward replay`.",
            code="reward_position_backwards",
        )
    return Learner(posterior.head, read_guards(session, encoder), read_raters(session)), posterior


def read_raters(session: Session) -> Iterator[Rater]:
    """Yield the raters as they are stored."""
    for found in session.execute(sa.select(*(getattr(RewardRater, name) for name in _TYPES))):
        yield Rater(**dict(zip(_TYPES, found, strict=True)))


def reasons_against_raters(session: Session) -> dict[str, str]:
    """Return why those raters do not count who do not, as a stable key, by name."""
    return {rater.name: reason for rater in read_raters(session) if (reason := rater.reason_against)}


def read_guards(session: Session, encoder: str) -> Guards:
    """Return the guards as they are stored; new ones where nothing was learned yet."""
    # As text: no JSON parser in between that could round a number.
    stored = session.scalar(sa.select(sa.cast(RewardState.guards, sa.Text)).where(RewardState.encoder == encoder))
    return Guards.read(stored) if stored else Guards()


def save(session: Session, learner: Learner, posterior: Posterior, encoder: str) -> None:
    """Write the guards, and the raters that changed, within the caller's transaction."""
    session.execute(
        sa.text(
            "INSERT INTO reward_state (encoder, guards, update_seq) "
            "VALUES (:encoder, CAST(:guards AS jsonb), :seq) "
            "ON CONFLICT (encoder) DO UPDATE SET guards = excluded.guards, update_seq = excluded.update_seq, "
            "updated_at = now()"
        ),
        {"encoder": encoder, "guards": learner.guards.dump().decode(), "seq": posterior.update_seq},
    )
    _RATERS.write(session, [{name: getattr(r, name) for name in _TYPES} for r in learner.raters.changed()])
