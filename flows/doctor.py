"""``everloop doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import typer
from rich.table import Table
from rich.text import Text

from deploy.doctor import check_adapters
from infra import report
from infra.doctor import machine, services
from infra.doctor.findings import Check, Finding, run
from infra.errors import EverloopError
from infra.report import JsonPath
from infra.settings import Settings, home_dir, load

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(json_path: JsonPath = None) -> None:
    """Check the machine, the settings and every service; say what to do. Exit status 1 where something fails."""
    found = list(run(checks()))
    is_well = all(finding.verdict != "fail" for finding in found)
    report.write_json(json_path, {"ok": is_well, "findings": [asdict(finding) for finding in found]})
    if json_path != "-":
        _print(found)
    if not is_well:
        raise typer.Exit(1)


def checks() -> dict[str, Check]:
    """Return what there is to check; where the settings cannot be read, what does without them."""
    general: dict[str, Check] = {"machine": machine.check_machine, "versions": machine.check_versions}
    try:
        settings = load()
    except EverloopError as error:
        unreadable = Finding(
            "settings", "fail", error.message, f"Mend {home_dir() / 'everloop.toml'} or EVERLOOP_*."
        )
        return {"settings": lambda: [unreadable], **general}
    concerned = {
        "settings": check_settings,
        "home": machine.check_home,
        "base model": machine.check_model,
        "stack": services.check_stack,
        "database": services.check_database,
        "broker": services.check_broker,
        "engine": services.check_engines,
        "api": services.check_http,
        "adapters": check_adapters,
    }
    return {**general, **{name: partial(check, settings) for name, check in concerned.items()}}


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Tell where the settings come from, and whether the recipe of the night can be read."""
    file = settings.home / "everloop.toml"
    yield Finding("settings", "ok", f"{file} and EVERLOOP_*" if file.exists() else f"EVERLOOP_* (no {file})")
    if settings.training_config_file is None:
        return
    from trainer.config import read_toml
    from trainer.recipe import resolve

    try:
        resolve(read_toml(settings.training_config_file))
    except (EverloopError, OSError) as error:
        told = f"{settings.training_config_file}: {getattr(error, 'message', None) or error}"
        yield Finding("recipe", "fail", told, "Nights fail until it is mended.")
    else:
        yield Finding("recipe", "ok", str(settings.training_config_file))


def _print(found: list[Finding]) -> None:
    table = Table.grid(padding=(0, 1))
    for finding in found:
        advice = f"\n{finding.advice}" if finding.advice else ""
        verdict = Text(finding.verdict, style=COLOURS[finding.verdict])
        table.add_row(verdict, finding.name, Text.assemble(finding.told, (advice, "dim")))
    report.output.print(table)
