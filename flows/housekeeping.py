"""What is deleted when its time is over, and made before it is needed; the ledger does it once a minute."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import deploy.retention
from feedback import partitions
from infra.db import Sessions, advisory_lock
from infra.log import retention
from infra.settings import Settings

LOCK = "housekeeping"  # held by whoever deletes what is past its time, or needs it to stay


def keep_house(sessions: Sessions, settings: Settings) -> dict[str, Any] | None:
    """Make partitions ahead of time, prune the log and the adapters' files.

    Returns
    -------
    dict
        ``events`` that were deleted, and of adapters what :class:`deploy.retention.Pruned` says; None where another
        process is at it.
    """
    with advisory_lock(sessions, LOCK) as held:
        if not held:
            return None
        with sessions.begin() as session:
            partitions.ensure(session)
        num_events = retention.prune(sessions, settings)
        return {"events": num_events, **asdict(deploy.retention.prune(sessions, settings))}
