"""``everloop reward``: the state of the reward model, gold probes, raters, and learning anew from the log."""

from __future__ import annotations

import getpass
import time
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.table import Table

from infra import report
from infra.db import Sessions, connect, transaction
from infra.errors import ConflictError, InvalidRequestError
from infra.report import JsonPath
from infra.settings import load
from reward import CONSUMER

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the decision.")]
UserName = Annotated[str, typer.Argument(help="A user, or (as program:NAME) a verifier or judge.")]


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
def gold(
    episode: Annotated[str, typer.Argument(help="The answer that you judge.")],
    reason: Reason,
    good: Annotated[bool, typer.Option("--good/--bad", help="Your verdict.")] = True,
    over: Annotated[str | None, typer.Option("--over", help="Judge it against this answer.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Judge an answer yourself: raters are held against it."""
    from reward.decisions import give_probe

    with transaction(_sessions()) as session:
        probe = give_probe(session, episode, good=good, over=over, operator=getpass.getuser(), reason=reason)
    report.write_json(json_path, {"probe": probe})
    report.say(f"probe {probe}")


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
def ban(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Take out all that a rater said, and set aside what they will say."""
    _rule(user, "banned", reason, json_path)


@app.command()
def clear(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Count a rater fully, whatever their record says."""
    _rule(user, "cleared", reason, json_path)


@app.command()
def reinstate(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Take back what was decided about a rater: their record counts again."""
    _rule(user, None, reason, json_path)


@app.command()
def quarantine(
    name: Annotated[str | None, typer.Argument(help="A quarantine; without one, they are listed.")] = None,
    verdict: Annotated[str | None, typer.Option("--verdict", help="release, or discard.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept with the decision.")] = "",
    json_path: JsonPath = None,
) -> None:
    """List bursts of fresh accounts that were held, or decide about one."""
    from reward.decisions import give_ruling
    from reward.report import list_quarantines

    with transaction(_sessions()) as session:
        if name is None:
            found: dict[str, Any] = {"quarantines": list_quarantines(session)}
        else:
            if verdict not in ("release", "discard") or not reason:
                raise InvalidRequestError(
                    "Say --verdict release or --verdict discard, and --reason.", code="verdict_required"
                )
            ruling = None if verdict == "release" else "banned"
            who = getpass.getuser()
            found = {
                "ruling": give_ruling(session, quarantine=name, ruling=ruling, operator=who, reason=reason)  # type: ignore[arg-type]
            }
    report.print_fields(json_path, found)


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
            "The reward worker gave it up, and nothing has changed; `everloop log dead-letters` says why.",
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


def _rule(user: str, ruling: Any, reason: str, json_path: str | None) -> None:
    from reward.decisions import give_ruling, rater_of

    with transaction(_sessions()) as session:
        rater = rater_of(session, user)
        found = give_ruling(session, rater=rater, ruling=ruling, operator=getpass.getuser(), reason=reason)
    report.write_json(json_path, {"ruling": found})
    report.say(f"{user}: {ruling or 'as their record says'}")


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
