"""``everloop up``, ``down`` and ``status``."""

from __future__ import annotations

import signal
import threading
from dataclasses import asdict
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from infra import report
from infra.report import JsonPath
from infra.settings import Settings, load
from infra.stack import embedded
from infra.stack.supervisor import Supervisor


def up(
    detach: Annotated[bool, typer.Option("--detach", help="Return when everything is up.")] = False,
) -> None:
    """Start the embedded stack and serve until Ctrl-C."""
    stop_on_sigterm()
    settings = embedded.up(load(recorded_addresses=False), report.say)
    embedded.tell_way_in(settings, report.say)
    report.say(f"night runs and canaries: {(settings.prefect_url or '').removesuffix('/api')}")
    if not detach:
        serve_until_interrupted(settings)


def stop_on_sigterm() -> None:
    """Make SIGTERM end a command as Ctrl-C does, so that nothing is left running behind it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def serve_until_interrupted(settings: Settings) -> None:
    """Wait for Ctrl-C (or SIGTERM), then stop the stack."""
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
    stopped = embedded.down(load())
    report.say("stopped" if stopped else "nothing was running")


def migrate(
    patience_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the database.")] = 60.0,
) -> None:
    """Bring the tables of a database of yours to this version; `up` does it for its own."""
    embedded.migrate(load(), patience_s)
    report.say("the database has the tables of this version")


def status(json_path: JsonPath = None) -> None:
    """Show each part and what is deployed; exit status 1 where something is not well."""
    settings = load()
    supervisor = Supervisor(settings)
    if not supervisor.running():
        report.write_json(json_path, {"running": False, "parts": []})
        report.say("not running; start it with `everloop up`")
        raise typer.Exit(1)
    parts = supervisor.status()
    deployment = _deployment(settings)
    report.write_json(
        json_path,
        {
            "running": True,
            "url": settings.public_url,
            "parts": [asdict(part) for part in parts],
            "deployment": deployment,
        },
    )
    if json_path != "-":
        table = Table("part", "state", "pid", "up (s)", "restarts", box=None)
        for part in parts:
            colour = "green" if part.state == "running" else "red"
            state = f"[{colour}]{part.state}[/{colour}]"
            table.add_row(part.name, state, str(part.pid or "-"), str(part.uptime_s), str(part.restarts))
        report.output.print(table)
        report.output.print(f"{settings.public_url}  {_deployment_line(deployment)}")
    if deployment is None or any(part.state != "running" for part in parts):
        raise typer.Exit(1)


def _deployment(settings: Settings) -> dict[str, Any] | None:
    try:
        response = httpx.get(
            f"{settings.public_url}/v1/deployment", timeout=2, trust_env=False, headers=settings.credentials
        )
        return dict(response.json()) if response.status_code == 200 else None
    except httpx.HTTPError:
        return None


def _deployment_line(deployment: dict[str, Any] | None) -> str:
    if deployment is None:
        return "the API does not answer"
    line = f"champion {deployment['champion']}"
    if deployment["challenger"]:
        line += f", canary {deployment['challenger']} for {deployment['share']:.0%} of users"
    return line
