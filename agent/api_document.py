"""Writes ``docs/openapi.json``, what the running API shows under ``/openapi.json``; a test keeps it so."""

from __future__ import annotations

import json
from pathlib import Path

from agent.app import build_app
from infra.settings import Settings


def document() -> str:
    """Return the OpenAPI document; nothing is connected to for it."""
    return json.dumps(build_app(Settings(home=Path("/nowhere"))).openapi(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "openapi.json").write_text(document())
