"""What every long-running process does: tell of itself, and stop when asked."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.registry import Collector

from infra.settings import Settings, home_dir
from infra.telemetry import exposition, logs, tracing

GIVE_UP_S = 6.0  # supervisord kills after infra.stack.supervisor.STOP_WAIT_S
BEAT_EVERY_S = 5.0


class Heartbeat(threading.Event):
    """A stop event that leaves a sign of life whenever a loop looks at it: the time of a file.

    Parts without an HTTP address are watched by it: where the file is old, no loop of the process has come round.

    Parameters
    ----------
    path
        The file; a disk that does not take it stops nobody.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._next_s = 0.0

    def is_set(self) -> bool:
        """Tell whether to stop."""
        self._beat()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait to be told to stop."""
        self._beat()
        return super().wait(timeout)

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + BEAT_EVERY_S
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()


def run_until_stopped(
    name: str, run: Callable[[threading.Event], None], settings: Settings | None = None, *collectors: Collector
) -> None:
    """Call ``run(stop)``; SIGTERM and SIGINT set `stop`, so that work in hand is finished first.

    Work that takes too long is given up: the process ends, and its transaction with it; the next begins it anew.
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
    stop = Heartbeat(home_dir() / "run" / f"{name}.alive")

    def begin_to_stop(*_: object) -> None:
        stop.set()
        limit = threading.Timer(GIVE_UP_S, _give_up, [name])
        limit.daemon = True
        limit.start()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, begin_to_stop)
    logging.getLogger(f"everloop.{name}").info("started")
    try:
        run(stop)
    except Exception:
        logging.getLogger(f"everloop.{name}").exception("failed")
        logging.shutdown()
        os._exit(1)
    tracing.stop()
    logging.getLogger(f"everloop.{name}").info("stopped")


def _give_up(name: str) -> None:
    logging.getLogger(f"everloop.{name}").warning("stopped in the middle of its work, of which nothing is kept")
    logging.shutdown()
    os._exit(0)


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
