"""``everloop audit``: read and verify the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from deploy import audit
from infra import report
from infra.db import connect, transaction
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", min=1)] = 30,
    automatic: Annotated[
        bool | None, typer.Option("--automatic/--by-hand", help="Only what the platform did by itself, or people.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Show the newest entries."""
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        rows = [audit.as_dict(entry) for entry in audit.newest(session, limit, automatic=automatic)]
    report.write_json(json_path, {"entries": rows})
    if json_path != "-":
        table = Table("#", "when", "who", "from", "what", "on", "why", box=None)
        for row in rows:
            names = ("id", "created_at", "actor", "address", "action", "subject", "reason")
            table.add_row(*(str(row[name] if row[name] is not None else "") for name in names))
        report.output.print(table)


@app.command()
def verify(
    expect: Annotated[
        str | None, typer.Option("--expect", help="A hash that was the last before: it must still be there.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Compute every hash anew; exit status 1 where an entry was changed, or is missing."""
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        found = audit.verify(session, expect)
    report.write_json(json_path, asdict(found))
    last = f"; the last has the hash {found.last_hash}" if found.entries else ""
    report.say(f"{found.entries} entries, none changed{last}")
