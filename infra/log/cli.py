"""``everloop log``: the state of the log, replay, dead letters."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from infra import report
from infra.db import Sessions, connect, transaction
from infra.errors import InvalidRequestError
from infra.events import TOPICS
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
dead = typer.Typer(no_args_is_help=True, help="What consumers gave up.", rich_markup_mode=None)
app.add_typer(dead, name="dead")

LetterId = Annotated[int, typer.Argument(help="Number of the dead letter, from `dead list`.")]


def _sessions() -> Sessions:
    return connect(load().need("database_url"), pool_size=1)


@app.command()
def status(json_path: JsonPath = None) -> None:
    """Show what waits, how far each consumer is behind, and what was given up."""
    from infra.log import metrics

    with transaction(_sessions()) as session:
        found = metrics.read(session)
    report.write_json(json_path, found.as_dict())
    if json_path == "-":
        return
    report.output.print(f"{found.num_waiting} events wait for Kafka, the oldest for {found.oldest_waiting_s:.1f} s")
    table = Table("consumer", "topic", "partition", "behind by", box=None)
    for lag in found.lags:
        table.add_row(lag.consumer, lag.topic, str(lag.partition), str(lag.records))
    report.output.print(table)
    for consumer, count in found.dead_letters.items():
        report.output.print(f"{count} dead letters of {consumer}; see `everloop log dead list`")


@app.command()
def replay(
    from_seq: Annotated[int, typer.Option("--from", min=0, help="First sequence number of the outbox.")],
    topic: Annotated[list[str] | None, typer.Option("--topic", help="Only this topic; may be repeated.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Publish events again; consumers that have applied one skip it."""
    from infra.log import outbox

    unknown = sorted(set(topic or ()).difference(TOPICS))
    if unknown:
        raise InvalidRequestError(
            f"There is no topic {unknown[0]!r}; there are {', '.join(TOPICS)}.", code="unknown_topic"
        )
    with transaction(_sessions()) as session:
        count = outbox.republish(session, from_seq, topic or ())
    report.write_json(json_path, {"from_seq": from_seq, "topics": topic or list(TOPICS), "events": count})
    report.say(f"{count} events go out again")


@app.command()
def retire(consumer: Annotated[str, typer.Argument(help="Name of the consumer, from `log status`.")]) -> None:
    """Forget a consumer that will not come back; the log then keeps nothing for it."""
    from infra.log import retention

    with transaction(_sessions()) as session:
        retention.retire(session, consumer)
    report.say(f"{consumer} is retired")


@dead.command("list")
def list_dead(
    every: Annotated[bool, typer.Option("--all", help="Those retried or dropped before, too.")] = False,
    json_path: JsonPath = None,
) -> None:
    """List dead letters, the newest first."""
    import sqlalchemy as sa
    from sqlalchemy.orm import defer

    from infra.tables import DeadLetter

    # Without what was on Kafka: a thousand large values would not fit into memory.
    query = sa.select(DeadLetter).options(defer(DeadLetter.value)).order_by(DeadLetter.id.desc()).limit(1000)
    with transaction(_sessions()) as session:
        letters = session.scalars(query if every else query.where(DeadLetter.state == "open")).all()
    rows = [
        {
            "id": letter.id,
            "consumer": letter.consumer,
            "place": f"{letter.topic}/{letter.partition}/{letter.offset}",
            "event_id": letter.event_id,
            "reason": letter.reason,
            "tries": letter.tries,
            "state": letter.state,
            "created_at": letter.created_at.isoformat(timespec="seconds"),
        }
        for letter in letters
    ]
    report.write_json(json_path, {"dead_letters": rows})
    if json_path != "-":
        table = Table("id", "consumer", "place", "reason", "state", "at", box=None)
        for row in rows:
            table.add_row(
                *(str(row[name]) for name in ("id", "consumer", "place", "reason", "state", "created_at"))
            )
        report.output.print(table)


@dead.command("show")
def show_dead(letter_id: LetterId, json_path: JsonPath = None) -> None:
    """Show one dead letter: reason, stack, and the start of what was on Kafka."""
    from infra.log import dead_letters

    with transaction(_sessions()) as session:
        letter = dead_letters.find(session, letter_id)
        shown = {
            "id": letter.id,
            "consumer": letter.consumer,
            "place": f"{letter.topic}/{letter.partition}/{letter.offset}",
            "event_id": letter.event_id,
            "state": letter.state,
            "tries": letter.tries,
            "reason": letter.reason,
            "num_bytes": len(letter.value),
            "value": letter.value[:2000].decode(errors="replace"),
            "stack": letter.stack,
        }
    report.write_json(json_path, shown)
    if json_path != "-":
        for name, value in shown.items():
            report.output.print(f"[bold]{name}[/bold]", end=" ")
            report.output.print(str(value), markup=False)


@dead.command("retry")
def retry_dead(letter_id: LetterId) -> None:
    """Send it to its consumer again (after a fix); the others skip it."""
    from infra.log import dead_letters

    with transaction(_sessions()) as session:
        dead_letters.retry(session, letter_id)
    report.say(f"dead letter {letter_id} goes out again")


@dead.command("drop")
def drop_dead(letter_id: LetterId) -> None:
    """Close it; its event stays given up."""
    from infra.log import dead_letters

    with transaction(_sessions()) as session:
        dead_letters.drop(session, letter_id)
    report.say(f"dead letter {letter_id} dropped")
