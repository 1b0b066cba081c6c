"""``everloop backup`` and ``everloop restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra import report
from infra.report import JsonPath
from infra.settings import load


def backup(
    target: Annotated[Path, typer.Argument(help="A directory that is not there yet.")], json_path: JsonPath = None
) -> None:
    """Write the database, adapters, backbones, datasets and settings to a directory, while everything runs.

    It holds what people said, and the keys to it: keep it as you keep the database. Secrets among the settings are
    left out.
    """
    from flows.backup.taking import take

    manifest, digest = take(load(), target.absolute(), report.say)
    found = {
        "path": str(target.absolute()),
        "sha256": digest,
        "bytes": sum(facts["bytes"] for facts in manifest.files.values()),
        "counts": manifest.counts,
        "audit_entries": manifest.audit["entries"],
        "missing_adapters": manifest.missing_adapters,
        "settings_left_out": manifest.left_out,
    }
    report.print_fields(json_path, found)
    report.say(f"note the SHA-256 elsewhere: `everloop restore {target} --expect {digest}` makes sure of it")


def restore(
    source: Annotated[Path, typer.Argument(help="What `everloop backup` wrote.")],
    expect: Annotated[
        str | None, typer.Option("--expect", help="SHA-256 of its manifest, as `everloop backup` told it.")
    ] = None,
    erasures: Annotated[
        Path | None,
        typer.Option("--erasures", help="Whom to forget again: what `everloop users erasures --json` wrote since."),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Restore a backup into an empty EVERLOOP_HOME; check the audit log and the reward model in it."""
    from flows.backup.restoring import restore as act

    report.print_fields(json_path, act(source.absolute(), report.say, expected=expect, erasures=erasures))
    report.say("restored; start it with `everloop up`")
    if erasures is None:
        report.say("whoever was forgotten after the backup is in it again: see --erasures")
