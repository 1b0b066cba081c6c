"""Leases: which process of a consumer works on which partitions.

Kafka's consumer groups would do it, at 3 s for each join and the session timeout (6 s and more) after a kill. Here
a lease is an advisory lock of PostgreSQL on the connection that also does the work: it ends with the process, and
work on a connection that lost its leases cannot commit. Members count each other by a shared
lock, and whoever holds more than a fair share lets go between two batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import sqlalchemy as sa

_MEMBERS = sa.text(
    "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
    "AND mode = 'ShareLock' AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND classid = (hashtext(:name)::bigint & 4294967295)::oid AND objid = 0"
)
_JOIN = sa.text("SELECT pg_advisory_lock_shared(hashtext(:name), 0)")
_TRY = sa.text("SELECT pg_try_advisory_lock(hashtext(:name), hashtext(:unit))")
_RELEASE = sa.text("SELECT pg_advisory_unlock(hashtext(:name), hashtext(:unit))")
_RELEASE_ALL = sa.text("SELECT pg_advisory_unlock_all()")


def num_members(connection: sa.Connection, consumer: str) -> int:
    """Return how many processes of a consumer are running."""
    return int(connection.scalar(_MEMBERS, {"name": _lock_name(consumer)}) or 0)


def _lock_name(consumer: str) -> str:
    return f"everloop.consumer.{consumer}"


class Leases:
    """One member's part of the units of a consumer.

    Parameters
    ----------
    name
        The consumer; its processes share the units between them.

    Attributes
    ----------
    connection
        The connection that holds the leases. Work under a lease must be done on it.
    held
        Units held now.
    """

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self.consumer = name
        self.name = _lock_name(name)
        self.connection = engine.connect()
        self.held: set[str] = set()

    def __enter__(self) -> Self:
        self.connection.execute(_JOIN, {"name": self.name})
        self.connection.commit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self.connection.invalidated:
                self.connection.rollback()
                self.connection.execute(_RELEASE_ALL)
                self.connection.commit()
        finally:
            self.connection.close()

    def balance(self, units: Sequence[str]) -> set[str]:
        """Take free units up to a fair share, let go of what is over it, and return what is held."""
        members = max(num_members(self.connection, self.consumer), 1)
        fair_share = -(-len(units) // members)
        for unit in sorted(self.held)[fair_share:]:
            self.connection.execute(_RELEASE, {"name": self.name, "unit": unit})
            self.held.discard(unit)
        for unit in units:
            if len(self.held) >= fair_share:
                break
            if unit not in self.held and self.connection.scalar(_TRY, {"name": self.name, "unit": unit}):
                self.held.add(unit)
        self.connection.commit()
        return set(self.held)
