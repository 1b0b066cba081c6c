"""Whether what is stored of the reward model is what was learned: its posterior, and a replay of its history."""

from __future__ import annotations

from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.errors import IntegrityError
from reward import store
from reward.history import Posterior
from reward.online import BayesianHead
from reward.tables import RewardSnapshot, RewardUpdate

# Another processor may round otherwise; a signal that is missing or counted twice moves a posterior by far more.
MAX_DIFFERENCE = 1e-6


def posteriors(session: Session) -> dict[str, dict[str, Any]]:
    """Return, for each encoder that anything was learned under, what its posterior is now."""
    return {name: _facts(store.load_posterior(session, name, dim)) for name, dim in _encoders(session).items()}


def verify(session: Session, expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compare the posteriors with what they were, and with a replay of the history from its beginning.

    Where somebody was erased, the beginning is the snapshot that stands for all before. Nothing is written.

    Parameters
    ----------
    expected
        What :func:`posteriors` returned.

    Returns
    -------
    dict
        By encoder: ``num_signals``, ``replayed`` updates, whether it is the same to the bit (``same_bits``), and
        the largest ``difference`` of the replay.

    Raises
    ------
    IntegrityError
        Code ``reward_differs``, or as :func:`reward.store.load_posterior` does.
    """
    dims = _encoders(session)
    if dims.keys() != expected.keys():
        raise _differs(f"it was learned under {sorted(expected)}, and now under {sorted(dims)}")
    return {name: _verified(session, name, dim, expected[name]) for name, dim in dims.items()}


def _verified(session: Session, name: str, dim: int, expected: dict[str, Any]) -> dict[str, Any]:
    now = store.load_posterior(session, name, dim)
    facts = _facts(now)
    for key in ("update_seq", "num_signals"):
        if facts[key] != expected[key]:
            raise _differs(f"{name} has {key} {facts[key]}, and had {expected[key]}")
    norm = abs(facts["norm"] - expected["norm"])
    replayed, number = _replayed(session, name, dim)
    difference = max(
        norm,
        float(np.abs(replayed.head.theta - now.head.theta).max()),
        float(np.abs(replayed.head.covariance - now.head.covariance).max()),
    )
    if difference > MAX_DIFFERENCE or replayed.num_signals != now.num_signals:
        raise _differs(f"a replay of the {number} updates under {name} is off by {difference:.3g}")
    same = facts["digest"] == expected["digest"]
    return {"num_signals": now.num_signals, "replayed": number, "same_bits": same, "difference": difference}


def _replayed(session: Session, name: str, dim: int) -> tuple[Posterior, int]:
    updates = session.scalars(
        sa.select(RewardUpdate).where(RewardUpdate.encoder == name).order_by(RewardUpdate.seq)
    ).all()
    snapshots = sa.select(RewardSnapshot).where(RewardSnapshot.encoder == name)
    erased = [update.seq for update in updates if not update.z and update.action != "inflate"]
    if erased:
        found = snapshots.where(RewardSnapshot.update_seq >= erased[-1]).order_by(RewardSnapshot.update_seq)
    else:  # a rebuild begins with a snapshot of the prior
        first = updates[0].seq if updates else 0
        found = snapshots.where(RewardSnapshot.update_seq < first).order_by(RewardSnapshot.update_seq.desc())
    begin = session.scalars(found.limit(1)).one_or_none()
    posterior = store.read_snapshot(begin) if begin else Posterior(BayesianHead.prior(dim), 0, 0)
    number = 0
    for update in updates:
        if update.seq > posterior.update_seq:
            posterior.replay(update)
            number += 1
    return posterior, number


def _encoders(session: Session) -> dict[str, int]:
    """Return the encoders that something was learned under, with the length of their features."""
    of_snapshots = sa.select(RewardSnapshot.encoder, sa.func.max(sa.func.octet_length(RewardSnapshot.theta)))
    of_updates = sa.select(RewardUpdate.encoder, sa.func.max(sa.func.octet_length(RewardUpdate.z)))
    found: dict[str, int] = {}
    for query, column in ((of_snapshots, RewardSnapshot.encoder), (of_updates, RewardUpdate.encoder)):
        for name, num_bytes in session.execute(query.group_by(column)):
            found[name] = max(found.get(name, 0), (num_bytes or 0) // np.dtype(np.float64).itemsize)
    return {name: dim for name, dim in sorted(found.items()) if dim}


def _facts(posterior: Posterior) -> dict[str, Any]:
    head = posterior.head
    return {
        "digest": head.digest(),
        "update_seq": posterior.update_seq,
        "num_signals": posterior.num_signals,
        "norm": float(np.linalg.norm(head.theta)),
    }


def _differs(why: str) -> IntegrityError:
    return IntegrityError(f"The reward model is not what it was: {why}.", code="reward_differs")
