"""``everloop canary``: open one, look at its evidence, hold it, end it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from deploy import canary, explanation
from deploy.cli import Reason, operator
from infra import report
from infra.report import JsonPath

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
CanaryId = Annotated[int, typer.Argument(metavar="ID", help="Number of the canary.")]


@app.command("list")
def list_(limit: Annotated[int, typer.Option("--limit", min=1)] = 20, json_path: JsonPath = None) -> None:
    """Show canaries, the newest first."""
    with operator().acting() as session:
        rows = [explanation.summary(found) for found in canary.newest(session, limit)]
    report.write_json(json_path, {"canaries": rows})
    if json_path != "-":
        table = Table("id", "challenger", "champion", "opened", "ended as", "why", box=None)
        for row in rows:
            table.add_row(*(str(row[name] or "") for name in explanation.SUMMARY))
        report.output.print(table)


@app.command("open")
def open_(
    release: Annotated[str, typer.Argument(help="Name of a release.")],
    reason: Reason,
    share: Annotated[
        float | None, typer.Option("--share", min=0.01, max=0.99, help="The only step; the settings' if unset.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Let a release meet some users."""
    told = explanation.summary(operator().try_out(release, reason, share))
    report.write_json(json_path, told)
    report.say(f"canary {told['id']}: {told['challenger']} beside {told['champion']}")


@app.command()
def explain(
    canary_id: CanaryId,
    all_: Annotated[bool, typer.Option("--all", help="Every event, not only those that tell most.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Compute a canary again from its log, and show the table that led to its decision."""
    with operator().acting() as session:
        told = explanation.explain(session, canary.get(session, canary_id))
    report.write_json(json_path, told)
    if json_path == "-":
        return
    rows = told["rows"] if all_ else explanation.telling(told["rows"])
    tests = list(told["limits"])
    table = Table("#", "s", "event", "users", "votes", "pairs", "share", *tests, "", box=None)
    for row in rows:
        e_values = [f"{row['e'][name]:.3g}" for name in tests]
        table.add_row(
            *(str(row["seq"]), f"{row['at_s']:.0f}", row["event"], row["users"], row["votes"], str(row["pairs"])),
            f"{row['share']:.0%}",
            *e_values,
            row["note"],
        )
    limits = [f"{told['limits'][name]:.3g}" for name in tests]
    table.add_row("", "", "limit", "", "", "", "", *limits, "")
    report.output.print(table)
    report.output.print(explanation.words(told))


def _act(json_path: str | None, canary_id: int, done: str) -> None:
    report.write_json(json_path, {"canary": canary_id, "action": done})
    report.say(f"canary {canary_id}: {done}")


@app.command()
def hold(canary_id: CanaryId, reason: Reason, json_path: JsonPath = None) -> None:
    """Stop automatic decisions; its users stay, and it goes on counting."""
    _hold(canary_id, "hold", reason, json_path)


@app.command()
def resume(canary_id: CanaryId, reason: Reason, json_path: JsonPath = None) -> None:
    """Let automatic decisions go on."""
    _hold(canary_id, "resume", reason, json_path)


def _hold(canary_id: int, kind: Any, reason: str, json_path: str | None) -> None:
    who = operator()
    with who.acting() as session:
        canary.hold(session, canary_id, kind, actor=who.name, reason=reason)
    _act(json_path, canary_id, {"hold": "held", "resume": "resumed"}[kind])


@app.command()
def abort(canary_id: CanaryId, reason: Reason, json_path: JsonPath = None) -> None:
    """End it; the champion stays."""
    who = operator()
    with who.acting() as session:
        canary.abort(session, canary_id, actor=who.name, reason=reason)
    _act(json_path, canary_id, "aborted")
