"""What every long-running process does: log to standard error, and stop when asked."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from infra.settings import home_dir

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


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error. Ids go into logs, never message text."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    for noisy in ("kafka", "httpx", "httpcore", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Warns about every callback over 0.1 s, which computing a feature always is.
    logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)


def run_until_stopped(name: str, run: Callable[[threading.Event], None]) -> None:
    """Call ``run(stop)``; SIGTERM and SIGINT set `stop`, so that work in hand is finished first.

    Where `run` raises, the process ends at once: threads that are still busy could keep it, and with it keep
    another from being started in its place.
    """
    setup_logging()
    stop = Heartbeat(home_dir() / "run" / f"{name}.alive")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    logging.getLogger(f"everloop.{name}").info("started")
    try:
        run(stop)
    except Exception:
        logging.getLogger(f"everloop.{name}").exception("failed")
        logging.shutdown()
        os._exit(1)
    logging.getLogger(f"everloop.{name}").info("stopped")


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
