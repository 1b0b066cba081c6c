"""``everloop feedback`` and ``everloop users``."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from feedback.exporting import Format, Selection
from infra import report
from infra.db import Sessions, connect, transaction
from infra.errors import InvalidRequestError, UnavailableError
from infra.report import JsonPath
from infra.settings import load

feedback = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
users_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

UserId = Annotated[
    str, typer.Argument(metavar="ID", help="The user's name, as in the chat requests; u_… of an account.")
]
ERASURE_TIMEOUT_S = 60.0


def _sessions() -> Sessions:
    return connect(load().need("database_url"), pool_size=2)


@feedback.command("receipts")
def rebuild_receipts(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the projection anew from the log.")],
    json_path: JsonPath = None,
) -> None:
    """Rebuild the receipts from the log; the result is the same."""
    from feedback import projection

    with transaction(_sessions()) as session:
        num_events = projection.rebuild(session)
    report.write_json(json_path, {"events": num_events})
    report.say(f"receipts made anew from {num_events} events")


@feedback.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines, plain or gzip; docs/import-export.md describes them.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 if any line was rejected.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Import outside answers and signals, each line once; a second start goes on where the first was ended."""
    from feedback.importing import import_file

    summary = import_file(_sessions(), file, load())
    report.write_json(json_path, asdict(summary))
    report.say(
        f"{summary.accepted} lines imported, {summary.already_imported} imported before, "
        f"{summary.rejected} rejected, in {summary.elapsed_s:.1f} s"
    )
    if summary.rejected:
        text = (
            f"{summary.rejected} lines were rejected; {summary.rejected_file} says why. Mend them in a file of "
            "their own, and import that."
        )
        if strict:
            raise InvalidRequestError(text, code="lines_rejected")
        report.say(f"[bold]warning[/bold] {text}")


@feedback.command("export")
def export(
    path: Annotated[Path, typer.Argument(help="The file to write; .gz compresses lines.")],
    format_: Annotated[Format, typer.Option("--format", help="jsonl can be imported again.")] = "jsonl",
    all_signals: Annotated[
        bool, typer.Option("--all-signals", help="Superseded and withdrawn signals, too.")
    ] = False,
    since: Annotated[
        str | None, typer.Option("--since", metavar="ISO", help="Answers from this time on (UTC, if no zone).")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="ID", help="Only answers given to them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Export the answers that may be learned from, with the signals that stand."""
    from feedback.exporting import export_file

    selection = Selection(all_signals, _moment(since), user)
    result = export_file(_sessions(), path, format_, selection, force=force)
    report.write_json(json_path, asdict(result))
    report.say(f"{result.rows} rows, {result.num_bytes} bytes in {result.file}, in {result.elapsed_s:.1f} s")


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"{text!r} is no time; write it as 2026-01-31 or 2026-01-31T12:00:00Z.", code="invalid_time"
        ) from error
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


@users_app.command("consent")
def consent(
    user_id: UserId,
    learn: Annotated[bool, typer.Option("--learn/--no-learn", help="Whether the assistant may learn from them.")],
) -> None:
    """Set whether a user may be learned from, from their next message on."""
    from feedback import users

    with transaction(_sessions()) as session:
        is_known = users.is_known(session, user_id)
        users.set_consent(session, user_id, learn)
    report.say(f"{user_id}: {'may be learned from' if learn else 'is not learned from'}")
    if not is_known:
        report.say(
            "[bold]warning[/bold] nobody of that name has said anything yet: it holds from their first message on. "
            "`everloop access list` has the IDs of accounts"
        )


@users_app.command("forget")
def forget(
    user_id: UserId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until every room has reported.")] = True,
    json_path: JsonPath = None,
) -> None:
    """Erase all that a user said, and say what was found where."""
    from feedback import erasure

    sessions = _sessions()
    with transaction(sessions) as session:
        erasure_id = erasure.forget(session, user_id, load().erasure_policy)
    _print_erasure(sessions, erasure_id, wait, json_path)


@users_app.command("erasure")
def show_erasure(
    erasure_id: Annotated[str, typer.Argument(help="Id of the erasure.")], json_path: JsonPath = None
) -> None:
    """Show the report of an erasure."""
    _print_erasure(_sessions(), erasure_id, False, json_path)


@users_app.command("erasures")
def list_erasures(json_path: JsonPath = None) -> None:
    """List all erasures; with --json a file for `everloop restore --erasures`."""
    from feedback import erasure

    with transaction(_sessions()) as session:
        found = erasure.all_erasures(session)
    report.write_json(json_path, {"erasures": found})
    if json_path != "-":
        for row in found:
            state = "complete" if row["complete"] else "not finished by every room"
            report.output.print(f"{row['erasure_id']}  {row['requested_at']}  {row['policy']}  {state}")


def _print_erasure(sessions: Sessions, erasure_id: str, wait: bool, json_path: str | None) -> None:
    from feedback import erasure

    deadline_s = time.monotonic() + (ERASURE_TIMEOUT_S if wait else 0)
    while True:
        with transaction(sessions) as session:
            found = erasure.get(session, erasure_id)
        if found["complete"] or time.monotonic() >= deadline_s:
            break
        time.sleep(0.2)
    report.write_json(json_path, found)
    if json_path != "-":
        for room, part in found["found"].items():
            what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in part.items())
            report.output.print(f"[bold]{room}[/bold]: {what}")
    if wait and not found["complete"]:
        raise UnavailableError(
            f"Not yet reported by {', '.join(found['pending'])}; are their workers running? The erasure goes on as "
            f"soon as they do: `everloop users erasure {erasure_id}`.",
            code="erasure_pending",
        )
