"""What commands print: progress on standard error, results on standard output or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

JsonPath = Annotated[str | None, typer.Option("--json", help="Write the report here; - is standard output.")]

errors = Console(stderr=True, highlight=False)
# Where there is no terminal to fit, a table need not be folded.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """Print a line of progress."""
    errors.print(f"[dim]everloop[/dim] {text}", soft_wrap=True)


def write_json(path: str | None, report: dict[str, Any]) -> None:
    """Write a report to `path`; ``-`` is standard output, None writes nothing."""
    if path is None:
        return
    text = json.dumps(report, indent=2, default=str) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


def print_fields(path: str | None, found: dict[str, Any]) -> None:
    """Write a report to `path`, and unless that is standard output print its fields, a line each."""
    write_json(path, found)
    if path != "-":
        table = Table("", "", box=None, show_header=False)
        for name, value in _flat(found):
            table.add_row(name, value)
        output.print(table)


def _flat(fields: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values, those of fields within fields as ``outer.inner``, and a line for each of a list."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list) and any(isinstance(row, dict) for row in value):
            for row in value:
                yield before + name, ", ".join(f"{key} {text}" for key, text in _flat(row))
        elif isinstance(value, list):
            yield before + name, ", ".join(map(_text, value))
        else:
            yield before + name, _text(value)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


LINE_EVERY_S = 10.0
MIN_DONE_TO_ESTIMATE = 0.05


class Phase:
    """Progress of one phase with its time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._started_s = self._line_at_s = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if errors.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=errors,
            )
            self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            say(f"{self.name}: 0/{self.total}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            say(f"{self.name}: {self.done}/{self.total} in {time.monotonic() - self._started_s:.0f} s")

    def update(self, done: int, total: int | None = None) -> None:
        """Note that `done` of the phase's steps are behind us."""
        self.done, self.total = done, total or self.total
        self._first = self._first or (done, time.monotonic())  # work that goes on was not all done now
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total)
        elif time.monotonic() - self._line_at_s > LINE_EVERY_S and done:
            self._line_at_s = time.monotonic()
            say(f"{self.name}: {done}/{self.total}{self._left()}")

    def _left(self) -> str:
        first_done, since_s = self._first or (0, self._started_s)
        done = self.done - first_done
        if not done or done < MIN_DONE_TO_ESTIMATE * self.total:
            return ""
        left_s = (time.monotonic() - since_s) / done * max(self.total - self.done, 0)
        return f", about {left_s:.0f} s left"

    def advance(self) -> None:
        """Note one more step."""
        self.update(self.done + 1)
