"""What a flow run shows in Prefect: tables of what it found, links to the operators' pages. It quotes nobody."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from infra.settings import Settings

log = logging.getLogger("everloop.flows")

GATE_COLUMNS = ("gate", "verdict", "value", "threshold", "n", "low", "high")


def table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Show a table; without rows, nothing."""
    if rows:
        plain = orjson.loads(orjson.dumps(list(rows), default=str))  # dates, and numbers that JSON has none of
        _show(create_table_artifact, table=plain, key=key, description=description)


def page(settings: Settings, key: str, path: str, text: str) -> None:
    """Link to one of the operators' pages; where the API has no known address, not at all."""
    if settings.public_url:
        _show(create_link_artifact, link=f"{settings.public_url}/operate{path}", link_text=text, key=key)


def of_night(settings: Settings, result: dict[str, Any], dataset_digest: str | None) -> None:
    """Show what a night came to: its gates, the card of its dataset, where it is on the pages."""
    run_id = result["run_id"]
    page(settings, "run", f"/runs/{run_id}", f"{run_id}: {result['status']}")
    if release := result.get("release"):
        page(settings, "release", f"/releases/{release}", str(release))
    if "canary_id" in result:
        page(settings, "canary", f"/rollout/{result['canary_id']}", f"canary {result['canary_id']}")
    gates = [{name: gate.get(name) for name in GATE_COLUMNS} for gate in result.get("gates", ())]
    table("gates", gates, f"The gates of {result.get('release')}")
    taken = {"seconds": result.get("seconds", {}), "signals set aside": result.get("set_aside", {})}
    rows = [{"what": what, "of": of, "number": n} for what, counts in taken.items() for of, n in counts.items()]
    table("run-in-numbers", rows, f"{run_id}: {result.get('reason') or result['status']}")
    if dataset_digest is not None:
        dataset_card(settings.datasets_dir / dataset_digest)


def dataset_card(directory: Path) -> None:
    """Show the card of a dataset, which counts and quotes nobody."""
    from trainer.snapshot import CARD_PAGE

    path = directory / CARD_PAGE
    if path.exists():
        _show(create_markdown_artifact, markdown=path.read_text(), key="dataset")


def _show(create: Any, **what: Any) -> None:
    """Create an artifact; a run does not fail for what it cannot show, as when Prefect is away."""
    try:
        create(**what)
    except Exception as error:
        log.warning("the artifact %s could not be shown: %s", what["key"], type(error).__name__)
