"""The embedded PostgreSQL without the rest of the stack."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.embedded import database_answers, init_postgres, with_addresses
from infra.stack.parts import embedded_parts
from infra.stack.supervisor import MARKER

START_TIMEOUT_S = 30.0


@contextmanager
def database_alone(settings: Settings) -> Iterator[Settings]:
    """Run PostgreSQL for the length of the block; yield the settings with its address.

    Where the settings place the database elsewhere, they are yielded as they are.

    Raises
    ------
    SetupError
        Code ``postgres_did_not_start``.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    settings, embedded = with_addresses(settings)
    if "database_url" not in embedded:
        yield settings
        return
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    init_postgres(settings)
    [part] = [part for part in embedded_parts(settings, {"database_url"}) if part.name == "postgres"]
    marked = {**os.environ, MARKER: str(settings.home)}  # one that is left behind is found by it, and ended
    with (settings.log_dir / "postgres.log").open("a") as log:
        server = subprocess.Popen(part.command, stdout=log, stderr=log, env=marked)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not database_answers(settings):
            if time.monotonic() > deadline or server.poll() is not None:
                raise SetupError(
                    f"PostgreSQL did not come up; its last words are in {log.name}.", code="postgres_did_not_start"
                )
            time.sleep(0.1)
        yield settings
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
