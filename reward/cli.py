"""``everloop reward``: the state of the reward model, its raters, and learning anew from the log."""

from __future__ import annotations

import time
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.table import Table

from infra import report
from infra.db import Sessions, connect, transaction
from infra.errors import ConflictError
from infra.report import JsonPath
from infra.settings import load
from reward import CONSUMER

Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the decision.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _sessions() -> Sessions:
    return connect(load().need("database_url"), pool_size=1)


@app.command()
def status(json_path: JsonPath = None) -> None:
    """How right it is, what each kind of signal is worth, who rates at all, and what was found suspicious."""
    from reward.report import summary

    with transaction(_sessions()) as session:
        found = summary(session)
    report.print_fields(json_path, found)


@app.command()
def raters(
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows.")] = 30,
    json_path: JsonPath = None,
) -> None:
    """List raters, the loudest first, with their reliability."""
    from reward.report import list_raters

    with transaction(_sessions()) as session:
        found = list_raters(session, limit)
    report.write_json(json_path, {"raters": found})
    if json_path != "-":
        table = Table("rater", "votes", "gold right", "gold wrong", "reliability", "state", box=None)
        for row in found:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
        report.output.print(table)


@app.command()
def replay(
    reason: Reason,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait for the worker.")] = 600.0,
    json_path: JsonPath = None,
) -> None:
    """Have the reward worker forget all that it learned, and learn it anew from the log."""
    from infra.events import RebuildRequested
    from infra.ids import new_id
    from infra.log import outbox
    from infra.tables import ConsumedEvent
    from reward.encoders import open_active_encoder

    event_id, sessions = new_id("rb"), _sessions()
    started_s = time.monotonic()
    with transaction(sessions) as session:
        encoder = open_active_encoder(session, load()).name
        event = RebuildRequested(encoder=encoder, reason=reason)
        outbox.append(session, event, key=encoder, event_id=event_id)
    while True:
        with transaction(sessions) as session:
            done = session.scalar(
                sa.select(ConsumedEvent.dead_letter).where(
                    ConsumedEvent.event_id == event_id, ConsumedEvent.consumer == CONSUMER
                )
            )
        if done is not None:
            break
        if time.monotonic() - started_s > timeout_s:
            raise ConflictError(
                "The reward worker has not done it yet; it will when it runs. See `everloop status`.",
                code="replay_pending",
            )
        time.sleep(0.1)
    if done:
        raise ConflictError(
            "The reward worker gave it up, and nothing has changed; `everloop log dead list` says why.",
            code="replay_failed",
        )
    seconds = time.monotonic() - started_s
    report.write_json(json_path, {"encoder": encoder, "seconds": seconds})
    report.say(f"learned anew under {encoder} in {seconds:.1f} s")


@app.command()
def backbone(
    max_pairs: Annotated[int | None, typer.Option("--max-pairs", min=8, help="Newest pairs trained on.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Longest training.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Train a reward backbone now, in this process, and judge it against the active encoder."""
    from reward import backbone
    from reward.backbone_config import BackboneConfig

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    given = {"max_pairs": max_pairs, "max_minutes": max_minutes}
    config = BackboneConfig.model_validate({name: value for name, value in given.items() if value is not None})
    result = backbone.run(sessions, settings, config, on_phase=report.say)
    report.write_json(json_path, result)
    if json_path != "-":
        _print_contest(result)


def _print_contest(result: dict[str, Any]) -> None:
    contest = result.get("contest")
    if contest is not None:
        table = Table("", "encoder", "n", "accuracy", "log loss", box=None)
        for side in ("active", "candidate"):
            table.add_row(
                side,
                contest[side]["encoder"],
                str(contest["num_judged"]),
                f"{contest[side]['accuracy']:.1%}",
                f"{contest[side]['log_loss']:.4f}",
            )
        report.output.print(table)
    report.output.print(f"[bold]{result['status']}[/bold]: {result['reason']}")
