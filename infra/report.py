"""What commands print: progress on standard error, results on standard output or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)


def say(text: str) -> None:
    """Print a line of progress."""
    errors.print(f"[dim]everloop[/dim] {text}")


def write_json(path: str | None, report: dict[str, Any]) -> None:
    """Write a report to `path`; ``-`` is standard output, None writes nothing."""
    if path is None:
        return
    text = json.dumps(report, indent=2, default=str) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)
