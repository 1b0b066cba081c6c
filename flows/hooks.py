"""Where somebody cancels a flow in Prefect: what its own process does, and Prefect when it has stopped that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prefect.exceptions import PrefectException

from deploy.runs import request_cancel_of_flow
from flows import prefect_view
from infra.db import DATABASE_AWAY, Sessions, connect
from infra.settings import load

log = logging.getLogger("everloop.flows")

ASK_EVERY_S = 1.0


@contextmanager
def heeding_cancellation(sessions: Sessions, flow_run_id: str | None) -> Iterator[None]:
    """Have a night look by itself whether its flow was cancelled: what Prefect tells its runner may come late.

    The runner hears of it by a message, and stops the process by a signal, which Python raises wherever it stands:
    where that is a call-back, nobody hears of it. So a night could end, and its release meet people, after it was
    cancelled. With Prefect away nothing is cancelled, and the night goes on.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(ASK_EVERY_S):
            try:
                with prefect_view.cancellation(str(flow_run_id)) as is_cancelled:
                    while not is_cancelled():
                        if ended.wait(ASK_EVERY_S):
                            return
                with sessions.begin() as session:
                    if request_cancel_of_flow(session, str(flow_run_id)) is not None:
                        return  # else the run is about to begin, or to be taken over
            except (httpx.HTTPError, PrefectException, *DATABASE_AWAY) as error:
                log.warning("could not look whether %s was cancelled: %s", flow_run_id, type(error).__name__)

    if flow_run_id is not None:
        threading.Thread(target=look, name="heed-cancellation", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def end_cancelled_night(flow: Any, flow_run: Any, state: Any) -> None:
    """Clean up after a night that somebody cancelled in Prefect: nothing of it stays, or is gone on with."""
    from trainer.night import end_cancelled

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    ended = end_cancelled(sessions, settings, str(flow_run.id))
    log.warning("%s: %s", flow_run.name, f"{ended} was cancelled" if ended else "no run was under way")
