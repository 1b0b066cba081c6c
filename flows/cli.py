"""``everloop demo`` and ``everloop train``."""

from __future__ import annotations

import asyncio
import getpass
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.preferences import BUILT_IN_PROMPTS
from infra import report
from infra.db import connect, transaction
from infra.report import JsonPath
from infra.settings import Settings, load
from infra.stack import embedded
from infra.stack.cli import serve_until_interrupted, stop_on_sigterm
from infra.stack.parts import prefect_environment
from infra.stack.supervisor import Supervisor

if TYPE_CHECKING:
    from flows.demo import Result

BUILT_IN_RATER = f"{shlex.quote(sys.executable)} -m flows.rater"


def demo(
    rater: Annotated[str, typer.Option("--rater", help="Program that rates, in JSON lines.")] = BUILT_IN_RATER,
    prompts: Annotated[Path, typer.Option("--prompts", help="One prompt per line.")] = BUILT_IN_PROMPTS,
    nights: Annotated[int, typer.Option("--nights", min=1, max=30)] = 1,
    rated: Annotated[int, typer.Option("--rated", min=20, max=400, help="Rated answers a day.")] = 220,
    canary_visits: Annotated[int, typer.Option("--canary-visits", min=20, max=400)] = 300,
    measured: Annotated[int, typer.Option("--measured", min=20, help="Held-out prompts measured.")] = 90,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    exit_: Annotated[bool, typer.Option("--exit", help="Stop the stack when done.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Take the loop round with a simulated population; exit status 0 only if it closed."""
    from flows.population import read_prompts

    started_s = time.monotonic()
    stop_on_sigterm()
    settings = load(recorded_addresses=False)
    prompt_list = read_prompts(prompts)
    was_running = Supervisor(settings).running()
    settings = load() if was_running else embedded.up(settings, report.say)
    embedded.tell_way_in(settings, report.say)
    report.say("[yellow]The users of this demo are simulated; everything else is real.[/yellow]")
    stop_at_end = not was_running and (exit_ or os.environ.get("CI") == "true")
    try:
        try:
            result = _play(settings, rater, prompt_list, nights, rated, canary_visits, measured, seed)
        except ExceptionGroup as group:  # of the population's tasks; the first to fail is the reason
            raise group.exceptions[0] from group
        result.wall_s = round(time.monotonic() - started_s, 1)
        _print(result)
        report.write_json(json_path, {**asdict(result), "closed": result.closed, "simulated_users": True})
        if not stop_at_end and not was_running:
            serve_until_interrupted(settings)
    finally:
        if not was_running:
            embedded.down(settings)
    if not result.closed:
        raise typer.Exit(1)


def _play(
    settings: Settings,
    rater: str,
    prompts: list[str],
    nights: int,
    rated: int,
    canary_visits: int,
    measured: int,
    seed: int,
) -> Result:
    os.environ.update(prefect_environment(settings))  # Prefect reads its settings at import
    os.environ.setdefault("EVERLOOP_RATER_SEED", str(seed))
    from flows.demo import Demo, Plan
    from flows.simulation import Simulation

    sessions = connect(settings.need("database_url"), pool_size=3)
    simulation = Simulation(settings, sessions, rater, prompts, seed=seed, actor="demo")
    return asyncio.run(Demo(settings, simulation, Plan(nights, rated, canary_visits, measured)).run())


def _print(result: Result) -> None:
    table = Table(
        "", "liked", "n", "95 %", "against base (95 %)", "words", "night (s)", "release", "decision", box=None
    )
    low, high = result.base_ci95
    table.add_row(
        "base",
        f"{result.base_rate:.1%}",
        str(result.base_n),
        f"{low:.1%} to {high:.1%}",
        "",
        str(result.base_mean_words),
    )
    for number, night in enumerate(result.nights, 1):
        table.add_row(
            f"night {number}",
            f"{night.rate:.1%}",
            str(night.n),
            f"{night.ci95[0]:.1%} to {night.ci95[1]:.1%}",
            f"{100 * night.difference:+.1f} points ({100 * night.difference_ci95[0]:+.1f} to "
            f"{100 * night.difference_ci95[1]:+.1f})",
            str(night.mean_words),
            f"{night.seconds:.0f}",
            night.adapter or "-",
            night.decision,
        )
    report.output.print("Simulated users on held-out prompts:")
    report.output.print(table)
    for number, night in enumerate(result.nights, 1):
        report.output.print(f"night {number}: {night.reason}")
        if night.set_aside:
            aside = ", ".join(f"{reason} {n}" for reason, n in night.set_aside.items())
            report.output.print(f"night {number} set aside: {aside}")
    if result.receipt is not None:
        report.output.print(f"The receipt of one vote ({result.receipt['id']}): {result.receipt['summary']}")
    report.output.print(
        f"{result.episodes} episodes, {result.feedback} signals, {result.lost_events} lost, "
        f"{result.wall_s:.0f} s in all"
    )
    verdict = "The loop closed." if result.closed else "The loop did NOT close."
    report.output.print(f"[bold]{verdict}[/bold]")


def train(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML with the recipe and its settings, instead of the night's.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A recipe with its defaults, instead of the night's.")
    ] = None,
    canary_share: Annotated[float | None, typer.Option("--canary-share", min=0.01, max=0.99)] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the recipes, and start nothing.")] = False,
    cancel: Annotated[str | None, typer.Option("--cancel", help="End this run after its current step.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why it is to end, for the audit log.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Start a run now, however few signals are new, and follow it to its end."""
    from trainer.config import read_toml
    from trainer.recipe import names, open_recipe, resolve

    if list_recipes:
        report.print_fields(json_path, {name: open_recipe(name).summary for name in names()})
        return
    settings = load()
    if cancel is not None:
        from deploy.runs import request_cancel

        if reason is None:
            raise typer.BadParameter("--cancel needs --reason.")
        with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
            request_cancel(session, cancel, actor=getpass.getuser(), reason=reason)
        report.say(f"{cancel} ends after its current step")
        return
    if recipe is not None and config_file is not None:
        raise typer.BadParameter("--config names its recipe itself: give one of the two.")
    file = config_file or settings.training_config_file
    given = {"recipe": recipe} if recipe else read_toml(file) if file else {}
    resolve(given)  # what is wrong with it is said here, and not by a run that fails
    sessions = connect(settings.need("database_url"), pool_size=2)
    os.environ.update(prefect_environment(settings))
    from flows.follow import run_night

    run = asyncio.run(run_night(sessions, {"canary_share": canary_share, "config": given, "min_new_signals": 0}))
    outcome = {"run": run.id, "status": run.status, "release": run.release, **(run.result or {})}
    report.write_json(json_path, outcome)
    code = f" [{outcome['code']}]" if "code" in outcome else ""
    report.say(f"{run.id}: {run.status} {run.release or ''} {outcome.get('reason', '')}{code}")
    if run.status in ("failed", "cancelled"):
        raise typer.Exit(1)
