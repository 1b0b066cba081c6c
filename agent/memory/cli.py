"""``everloop memory``: what importance weighs, and back to the defaults."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from agent.memory import importance, learning
from agent.memory.vectors import of_settings
from infra import report
from infra.db import connect, transaction
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
def weights(json_path: JsonPath = None) -> None:
    """Show what each feature weighs, and what the defaults are."""
    settings = load()
    has_vectors, has_sentences = of_settings(settings) is not None, settings.memory_encoder != "off"
    usual = importance.defaults(has_vectors=has_vectors, has_sentences=has_sentences)
    with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
        state = learning.current(session)
    now, defaults = asdict(state.weights(usual)), asdict(usual)
    facts = {"version": state.version, "votes": state.num_votes, "baseline": round(state.baseline, 3)}
    at_hand = {"vectors": has_vectors, "encoder": settings.memory_encoder}
    report.write_json(json_path, {**facts, **at_hand, "weights": now, "defaults": defaults})
    if json_path == "-":
        return
    table = Table("feature", "weight", "default", box=None)
    for name, value in now.items():
        table.add_row(name, f"{value:.3f}", f"{defaults[name]:.3f}")
    report.output.print(table)
    report.say(f"version {state.version}, from {state.num_votes} thumbs")


@app.command()
def reset(
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept with the version.")],
) -> None:
    """Go back to the default weights; earlier versions stay in the table."""
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        learning.reset(session, reason)
    report.say("the weights are the defaults again")
