"""Monthly partitions of the episodes. An id carries its time, so an id alone finds its partition."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.db import lock_until_commit
from infra.ids import first_id

MONTHS_AHEAD = 3
LOCK_TIMEOUT_MS = 2000


def ensure(session: Session, now: datetime | None = None) -> list[str]:
    """Create the partitions of this month and the next ones where they are missing; return the new names."""
    month = (now or datetime.now(UTC)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    created = []
    for _ in range(MONTHS_AHEAD + 1):
        if name := ensure_month(session, month):
            created.append(name)
        month = _next(month)
    return created


def ensure_month(session: Session, at: datetime) -> str | None:
    """Create the partition that holds `at`, unless it exists or its rows lie in the default one already."""
    month = at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    name = f"episodes_{month:%Y_%m}"
    low, high = first_id("ep", month), first_id("ep", _next(month))
    if session.scalar(sa.select(sa.func.to_regclass(name))) is not None:
        return None
    # Two at once would both find it missing.
    lock_until_commit(session, "partitions")
    if session.scalar(sa.select(sa.func.to_regclass(name))) is not None:
        return None
    in_default = sa.text("SELECT 1 FROM episodes_default WHERE id >= :low AND id < :high LIMIT 1")
    if session.scalar(in_default, {"low": low, "high": high}):
        return None
    # It waits for whoever reads the table, and everybody else would wait behind it: better to try again later.
    session.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_MS}ms'"))
    session.execute(sa.text(f"CREATE TABLE {name} PARTITION OF episodes FOR VALUES FROM ('{low}') TO ('{high}')"))
    session.execute(sa.text("SET LOCAL lock_timeout = DEFAULT"))
    return name


def _next(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
