"""What every long-running process does: log to standard error, and stop when asked."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

GIVE_UP_S = 6.0  # supervisord kills after infra.stack.supervisor.STOP_WAIT_S


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

    Work that takes too long is given up: the process ends, and its transaction with it; the next begins it anew.
    Where `run` raises, the process ends at once: threads that are still busy could keep it, and with it keep
    another from being started in its place.
    """
    setup_logging()
    stop = threading.Event()

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
    logging.getLogger(f"everloop.{name}").info("stopped")


def _give_up(name: str) -> None:
    logging.getLogger(f"everloop.{name}").warning("stopped in the middle of its work, of which nothing is kept")
    logging.shutdown()
    os._exit(0)


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
