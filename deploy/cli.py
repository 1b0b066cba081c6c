"""``everloop promote``, ``rollback``, ``autonomy``: an operator's decisions, with a reason."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from deploy import autonomy
from deploy.promotion import Operator
from infra import report
from infra.db import connect
from infra.report import JsonPath
from infra.settings import load

Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit log.")]


def operator() -> Operator:
    """Return who sits at this terminal."""
    settings = load()
    return Operator(connect(settings.need("database_url"), pool_size=1), settings, getpass.getuser())


def promote(
    release: Annotated[str, typer.Argument(help="Name of a release, e.g. r1-1a2b3c4d.")],
    reason: Reason,
    json_path: JsonPath = None,
) -> None:
    """Make a release the champion."""
    moved = operator().promote(release, reason)
    _tell(json_path, "promoted_by_hand", moved, reason)


def rollback(
    reason: Reason,
    to: Annotated[str | None, typer.Option("--to", help="A release; the champion before, if unset.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Go back to an earlier champion."""
    moved = operator().roll_back(to, reason)
    _tell(json_path, "rolled_back_by_hand", moved, reason)


def _tell(json_path: str | None, action: str, moved: tuple[str, str], reason: str) -> None:
    before, champion = moved
    report.write_json(json_path, {"action": action, "before": before, "champion": champion, "reason": reason})
    report.say(f"champion {before} → {champion}")


def set_autonomy(
    level: Annotated[
        str | None, typer.Argument(help="observe, propose, canary or auto; without it, what holds now.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; needed to set a level.")] = None,
    decline: Annotated[int | None, typer.Option("--decline", help="Decline the proposal of this number.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Show or set what the platform does by itself; show and decline what it proposes."""
    who = operator()
    settings, actor = who.settings, who.name
    with who.acting() as session:
        if level is not None:
            autonomy.set_level(session, settings, level, actor=actor, reason=reason or "")
        if decline is not None:
            autonomy.decline(session, decline, actor=actor, reason=reason or "")
        shown = {
            "level": autonomy.level(session, settings),
            "proposals": [
                {"id": p.id, "action": p.action, "release": p.release, "reason": p.reason}
                for p in autonomy.open_proposals(session)
            ],
        }
    report.print_fields(json_path, shown)
