"""``everloop promote`` and ``everloop rollback``: an operator's decision, with a reason."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from deploy import head, registry
from infra import report
from infra.db import connect, transaction
from infra.report import JsonPath
from infra.settings import load

Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit log.")]


def promote(
    release: Annotated[str, typer.Argument(help="Name of a release, e.g. r1-1a2b3c4d.")],
    reason: Reason,
    json_path: JsonPath = None,
) -> None:
    """Make a release the champion."""
    _move(release, "promoted_by_hand", reason, json_path)


def rollback(
    reason: Reason,
    to: Annotated[str | None, typer.Option("--to", help="A release; the champion before, if unset.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Go back to an earlier champion."""
    _move(to, "rolled_back_by_hand", reason, json_path)


def _move(release: str | None, action: str, reason: str, json_path: str | None) -> None:
    settings = load()
    with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
        registry.lock_head(session)  # its files stay while they are looked at
        before = head.read(session).champion
        target = registry.get_release(session, release or head.previous_champion(session)).name
        registry.verified_path(session, settings, target)
        head.move_champion(session, target, action=action, actor=getpass.getuser(), reason=reason)
    report.write_json(json_path, {"action": action, "before": before, "champion": target, "reason": reason})
    report.say(f"champion {before} → {target}")
