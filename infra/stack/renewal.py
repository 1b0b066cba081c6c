"""The embedded broker is started anew before it has grown large."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from infra.db import connect, locked_connection
from infra.log.relay import RELAY_LOCK
from infra.settings import Settings
from infra.stack.supervisor import Supervisor

MIB = 1024**2
MAX_BROKER_MIB = 512.0
TAKE_LOCK_S = 10.0
RESTART_S = 15.0
POLL_S = 0.02


def renew_broker(settings: Settings, max_mib: float = MAX_BROKER_MIB) -> float | None:
    """Start the embedded broker anew where it holds more than it may; return what it held (MiB), or None.

    Tansu's storage in memory keeps all that it was ever given: it applies no ``retention.ms`` and knows no
    DeleteRecords. What it holds are copies; what a consumer has not applied comes again from the outbox. The relay
    is held up meanwhile: it looks at what the broker has before it goes on, so that nothing newer comes first.
    """
    supervisor = Supervisor(settings)
    if not supervisor.running():
        return None
    pid = _pid(supervisor, "broker")
    if pid is None:  # the settings name another
        return None
    broker = psutil.Process(pid)
    held_mib = float(broker.memory_info().rss) / MIB
    if held_mib <= max_mib:
        return None
    with _relay_held(settings, supervisor) as is_held:
        if not is_held:
            return None  # the next run tries again
        broker.terminate()  # supervisord starts it again, even if this process ends here
        _wait(lambda: _pid(supervisor, "broker") not in (None, pid) and _listens(settings), RESTART_S)
    return held_mib


def _pid(supervisor: Supervisor, name: str) -> int | None:
    return next((part.pid for part in supervisor.status() if part.name == name), None)


@contextmanager
def _relay_held(settings: Settings, supervisor: Supervisor) -> Iterator[bool]:
    """End the relay, which is started again, and hold the lock that it publishes under; yield whether it is."""
    sessions = connect(settings.need("database_url"), pool_size=1)
    until_s = time.monotonic() + TAKE_LOCK_S
    if relay := _pid(supervisor, "relay"):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(relay).terminate()
    try:
        while True:
            with locked_connection(sessions, RELAY_LOCK) as connection:
                if connection is not None or time.monotonic() > until_s:
                    yield connection is not None
                    return
            time.sleep(POLL_S)
    finally:
        sessions.kw["bind"].dispose()


def _listens(settings: Settings) -> bool:
    host, _, port = settings.need("kafka_bootstrap").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _wait(is_there: Callable[[], bool], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while not is_there() and time.monotonic() < until_s:
        time.sleep(POLL_S)
