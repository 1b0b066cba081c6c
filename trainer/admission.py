"""Whether a night may start by schedule: quiet hours, and the cool-down after the champion changed.

Whoever starts one by hand is asked neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy.head import CANARY_ACTIONS, champion_after, champion_before
from deploy.tables import AuditEntry


def quiet_until(quiet_hours: Sequence[str], zone: ZoneInfo, now: datetime) -> datetime | None:
    """Return when the quiet hours end that `now` lies in, or None where it lies in none.

    Parameters
    ----------
    quiet_hours
        Each as ``22:00-06:00``, by the clock of the zone; the settings see to it that they leave some time.
    now
        With a time zone.

    Returns
    -------
    datetime
        In UTC. Where the clock is put back, the later of two moments of the same name.
    """
    windows = [tuple(map(time.fromisoformat, text.split("-"))) for text in quiet_hours]
    local = now.astimezone(zone)
    ends: datetime | None = None
    while True:
        found = [end for begin, end in windows if _is_within(local.timetz().replace(tzinfo=None), begin, end)]
        if not found:
            return ends.astimezone(UTC) if ends is not None else None
        local = ends = max(_next(local, end, zone) for end in found)  # those that adjoin are one


def _is_within(at: time, begin: time, end: time) -> bool:
    return begin <= at < end if begin < end else at >= begin or at < end


def _next(local: datetime, at: time, zone: ZoneInfo) -> datetime:
    """Return the next moment at which the clock of the zone shows `at`."""
    day = local.date() if local.timetz().replace(tzinfo=None) < at else local.date() + timedelta(days=1)
    moment = datetime.combine(day, at, zone)
    # Where the clock shows it twice, the later one; where it leaves it out, as far behind the gap as it would be.
    return max(moment, moment.replace(fold=1), key=lambda either: either.astimezone(UTC))


def cooling_until(session: Session, cool_down_s: float) -> datetime | None:
    """Return until when no night is to start, as somebody was promoted or rolled back; None where one may."""
    rolled_back = AuditEntry.action == CANARY_ACTIONS["rollback"]  # which leaves the champion where it was
    decided = sa.select(sa.func.max(AuditEntry.created_at)).where(
        sa.or_(champion_before != champion_after, rolled_back)
    )
    at: datetime | None = session.scalar(decided)
    until = at + timedelta(seconds=cool_down_s) if at is not None else None
    return until if until is not None and until > datetime.now(UTC) else None
