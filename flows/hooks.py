"""What is done when Prefect has stopped a flow's process; it calls these by the names of their parameters."""

from __future__ import annotations

import logging
from typing import Any

from infra.db import connect
from infra.settings import load

log = logging.getLogger("everloop.flows")


def end_cancelled_night(flow: Any, flow_run: Any, state: Any) -> None:
    """Clean up after a night that somebody cancelled in Prefect: nothing of it stays, or is gone on with."""
    from trainer.night import end_cancelled

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    ended = end_cancelled(sessions, settings, str(flow_run.id))
    log.warning("%s: %s", flow_run.name, f"{ended} was cancelled" if ended else "no run was under way")
