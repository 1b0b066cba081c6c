"""``everloop up``, ``down`` and ``status``."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.live import Live

from infra import report
from infra.report import JsonPath
from infra.settings import Settings, load
from infra.stack.supervisor import Supervisor

# What starts a stack is imported where that is done: looking at one takes half the time without it.
WATCH_EVERY_S = 1.0


def up(
    detach: Annotated[bool, typer.Option("--detach", help="Return when everything is up.")] = False,
) -> None:
    """Start the embedded stack and serve until Ctrl-C."""
    from infra.stack import embedded

    stop_on_sigterm()
    settings = embedded.up(load(recorded_addresses=False), report.say)
    embedded.tell_way_in(settings, report.say)
    kept = settings.home / "prefect.auth"
    asks = f" (asks for what is in {kept})" if kept.exists() else ""
    report.say(f"night runs and canaries: {(settings.prefect_url or '').removesuffix('/api')}{asks}")
    if not detach:
        serve_until_interrupted(settings)


def stop_on_sigterm() -> None:
    """Make SIGTERM end a command as Ctrl-C does, so that nothing is left running behind it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def serve_until_interrupted(settings: Settings) -> None:
    """Wait for Ctrl-C (or SIGTERM), then stop the stack."""
    from infra.stack import embedded

    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    report.say("serving; Ctrl-C stops everything")
    supervisor = Supervisor(settings)
    while not stop.wait(2.0):
        if not supervisor.running():
            report.say("the stack was stopped from elsewhere")
            return
    report.say("stopping")
    embedded.down(settings)


def down() -> None:
    """Stop the stack."""
    from infra.stack import embedded

    stopped = embedded.down(load())
    report.say("stopped" if stopped else "nothing was running")


def migrate(
    patience_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the database.")] = 60.0,
) -> None:
    """Bring the tables of a database of yours to this version; `up` does it for its own."""
    from infra.stack import embedded

    embedded.migrate(load(), patience_s)
    report.say("the database has the tables of this version")


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until Ctrl-C.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Show each part, the loop and what needs a decision; exit status 1 where something is not well."""
    from infra.stack.status import gather, is_well, view

    if watch:
        if json_path is not None:
            raise typer.BadParameter("--watch shows it on a terminal: give one of the two.")
        _watch(lambda: view(gather(load())))
        return
    found = gather(load())
    report.write_json(json_path, found)
    if not found["running"]:
        report.say("not running; start it with `everloop up`")
    elif json_path != "-":
        report.output.print(view(found))
    if not is_well(found):
        raise typer.Exit(1)


def _watch(look: Callable[[], RenderableType]) -> None:
    with Live(look(), console=report.output, screen=report.output.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_EVERY_S)
            live.update(look(), refresh=True)
