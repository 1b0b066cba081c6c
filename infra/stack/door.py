"""Holds the API's port open while the API is started anew: who connects meanwhile waits, instead of being refused.

A listening socket lives as long as any process has it. This process has it, accepts nobody, and hands a copy to
each API that asks at a socket in the run directory.
"""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

from infra.process import run_until_stopped
from infra.settings import Settings, load
from infra.stack.supervisor import socket_path

log = logging.getLogger("everloop.door")

BACKLOG = 2048  # connections that wait
TIMEOUT_S = 1.0


def path_of(settings: Settings) -> Path:
    """Return where the door is asked."""
    return socket_path(settings, "door")


def listening_socket(settings: Settings) -> socket.socket | None:
    """Return the socket that the API is to listen at; None where no door is running."""
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(TIMEOUT_S)
            door.connect(str(path_of(settings)))
            _, descriptors, _, _ = socket.recv_fds(door, 1, 1)
    except OSError:
        return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def hold(settings: Settings, stop: threading.Event) -> None:
    """Hold the port until told to stop."""
    path = path_of(settings)
    path.unlink(missing_ok=True)
    held = _bound(settings, stop)
    if held is None:
        return
    with held, socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        path.chmod(0o600)
        door.listen()
        door.settimeout(TIMEOUT_S)
        while not stop.is_set():
            try:
                asking, _ = door.accept()
            except TimeoutError:
                continue
            with asking:
                socket.send_fds(asking, [b"."], [held.fileno()])
    path.unlink(missing_ok=True)


def _bound(settings: Settings, stop: threading.Event) -> socket.socket | None:
    """Return the port's socket; where an API has it that found no door, once that has gone."""
    while not stop.is_set():
        try:
            address = settings.api_host, int(settings.need("api_port"))
            family = socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET
            return socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            log.warning("the port cannot be held: %s; trying again", error.strerror)
            stop.wait(TIMEOUT_S)
    return None


def main() -> None:
    """Run the door as a process."""
    settings = load()
    run_until_stopped("door", lambda stop: hold(settings, stop))


if __name__ == "__main__":
    main()
