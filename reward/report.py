"""What an operator wants to know of the reward model; docs/reward.md explains each number."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import User
from reward import state
from reward.raters import Rater, Raters, new_pools
from reward.tables import GoldProbe, RewardRater, RewardState, RewardUpdate, Solicitation


def newest_state(session: Session) -> RewardState | None:
    """Return the state of the encoder that learned last."""
    return session.scalars(sa.select(RewardState).order_by(RewardState.updated_at.desc()).limit(1)).first()


def summary(session: Session) -> dict[str, Any]:
    """Return the state of the encoder that learned last."""
    newest = newest_state(session)
    if newest is None:
        return {"encoder": None, "signals": 0}
    guards = state.read_guards(session, newest.encoder)
    actions = session.execute(
        sa.select(RewardUpdate.action, sa.func.count())
        .where(RewardUpdate.encoder == newest.encoder)
        .group_by(RewardUpdate.action)
    )
    held = sa.select(sa.func.count()).select_from(RewardRater).where(RewardRater.set_aside)
    return {
        "encoder": newest.encoder,
        "update_seq": newest.update_seq,
        "updates": {action: count for action, count in actions},  # noqa: C416
        "calibration": guards.calibration.report(),
        "kinds": guards.kinds.report(),
        "drift": {"detected": guards.drift.num_drifts, "inflation": guards.inflation},
        "usual_sd": guards.usual_sd,
        "propensity": guards.propensity.report(),
        "anchor": guards.anchor.report(),
        "asked": session.scalar(sa.select(sa.func.count()).select_from(Solicitation)),
        "gold_probes": session.scalar(sa.select(sa.func.count()).select_from(GoldProbe)),
        "pools": [pool.reliability for pool in guards.pools],
        "raters_set_aside": session.scalar(held),
        "quarantines": list_quarantines(session),
    }


def list_raters(session: Session, limit: int) -> list[dict[str, Any]]:
    """Return raters, the loudest first, by the name of the user where there is one."""
    newest = newest_state(session)
    guards = state.read_guards(session, newest.encoder) if newest else None
    everybody = Raters((guards.pools if guards else []) or new_pools())
    rows = list(state.read_raters(session))
    for rater in rows:
        everybody.admit(rater)
    rows = sorted(rows, key=lambda rater: -rater.num_votes)[:limit]
    names = dict(
        session.execute(sa.select(User.key_id, User.user_id).where(User.key_id.in_([r.name for r in rows])))
        .tuples()
        .all()
    )
    return [
        {
            "rater": names.get(rater.name, rater.name),
            "votes": rater.num_votes,
            "gold_right": rater.num_right,
            "gold_wrong": rater.num_wrong,
            "reliability": everybody.reliability(rater),
            "state": _state(rater),
        }
        for rater in rows
    ]


def list_quarantines(session: Session) -> list[dict[str, Any]]:
    """Return the bursts that nobody has decided about."""
    query = (
        sa.select(RewardRater.quarantine, sa.func.count(), sa.func.sum(RewardRater.num_votes))
        .where(RewardRater.quarantine.is_not(None))
        .group_by(RewardRater.quarantine)
        .order_by(RewardRater.quarantine)
    )
    return [
        {"quarantine": name, "raters": raters, "votes": int(votes)}
        for name, raters, votes in session.execute(query)
    ]


def _state(rater: Rater) -> str:
    if rater.ruling:
        return rater.ruling
    if rater.quarantine:
        return "quarantined"
    return "set aside" if rater.set_aside else "counts"
