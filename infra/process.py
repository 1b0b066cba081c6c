"""What every long-running process does: tell of itself, and stop when asked."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client.registry import Collector

from infra.settings import Settings
from infra.telemetry import exposition, logs, tracing


def run_until_stopped(
    name: str, run: Callable[[threading.Event], None], settings: Settings | None = None, *collectors: Collector
) -> None:
    """Call ``run(stop)``; SIGTERM and SIGINT set `stop`, so that work in hand is finished first.

    Where `run` raises, the process ends at once: threads that are still busy could keep it, and with it keep
    another from being started in its place.

    Parameters
    ----------
    settings
        How the process logs, where its spans go, and the port of its metrics; text on standard error, if unset.
    collectors
        What it tells of the database beside its own metrics.
    """
    tell_of_itself(name, settings, *collectors)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    logging.getLogger(f"everloop.{name}").info("started")
    try:
        run(stop)
    except Exception:
        logging.getLogger(f"everloop.{name}").exception("failed")
        logging.shutdown()
        os._exit(1)
    tracing.stop()
    logging.getLogger(f"everloop.{name}").info("stopped")


def tell_of_itself(name: str, settings: Settings | None, *collectors: Collector) -> None:
    """Set up a process's log and, where the settings say so, its traces and its metrics."""
    logs.setup(settings)
    if settings is not None:
        tracing.start(settings, name)
        exposition.serve(settings, *collectors)


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let something run beside the block, and end it with the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
