"""Pages from templates: how numbers and times are written, and charts that are tables first."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from infra.errors import EverloopError, NotFoundError

Cell = float | int | str | datetime | None
NOTHING = "–"
SKILL = "skill "  # how gates of single skills are called
MAX_SHOWN_ROWS = 400  # of a chart's table; its CSV has them all


@dataclass(frozen=True, slots=True)
class Series:
    """A column of a chart: what its head says, and how it is drawn (a limit is dashed; ``none`` is only told)."""

    label: str
    style: Literal["line", "limit", "points", "bars", "none"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """Figures that are drawn, told as a table, and given as CSV.

    Attributes
    ----------
    says
        What one sees in it, in a sentence: for who does not see it.
    x
        What the first column is.
    rows
        ``x`` and a value for each of the series; None leaves a gap.
    """

    id: str
    title: str
    says: str
    x: str
    series: Sequence[Series]
    rows: Sequence[Sequence[Cell]]
    is_log: bool = False
    unit: str = ""

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The rows that are drawn: at most :data:`MAX_SHOWN_ROWS`, evenly taken, with the last."""
        step = -(-len(self.rows) // MAX_SHOWN_ROWS)
        return self.rows if step <= 1 else [*self.rows[:-1:step], self.rows[-1]]


@dataclass(slots=True)
class Page:
    """What a template needs, and the charts on it."""

    template: str
    context: Mapping[str, Any]
    charts: Sequence[Chart] = field(default_factory=tuple)

    def respond(self, request: Request, csv_of: str | None = None) -> Response:
        """Return the page, or one of its charts as CSV.

        Raises
        ------
        NotFoundError
            Code ``chart_not_found``.
        """
        if csv_of is not None:
            return self._csv(csv_of)
        charts = {chart.id: chart for chart in self.charts}
        html = _environment.get_template(self.template).render(request=request, charts=charts, **self.context)
        return HTMLResponse(html, headers={"Cache-Control": "no-store"})

    def _csv(self, chart_id: str) -> Response:
        chart = next((chart for chart in self.charts if chart.id == chart_id), None)
        if chart is None:
            raise NotFoundError(f"There is no chart {chart_id!r} on this page.", code="chart_not_found")
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow([chart.x, *(series.label for series in chart.series)])
        writer.writerows(map(_plain, chart.rows))
        disposition = f'attachment; filename="everloop-{chart.id}.csv"'
        return Response(lines.getvalue(), media_type="text/csv", headers={"Content-Disposition": disposition})


def _plain(row: Sequence[Cell]) -> list[Any]:
    """Return a row as spreadsheets read it: a text is never taken for a formula."""
    return [f"'{cell}" if _is_formula(cell) else _as_text(cell) for cell in row]


def _is_formula(cell: Cell) -> bool:
    return isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r")


def _as_text(cell: Cell) -> Any:
    return cell.isoformat() if isinstance(cell, datetime) else cell


def failed(request: Request, error: EverloopError) -> HTMLResponse:
    """Return an error as a page, for who came with a browser."""
    html = _environment.get_template("error.html").render(request=request, error=error)
    return HTMLResponse(html, status_code=error.status)


# -- how things are written ------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, thousands apart."""
    if value is None:
        return NOTHING
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 0) -> str:
    """Write a share as a percentage."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}\u202f%"


def duration(seconds: float | None) -> str:
    """Write a length of time in its largest fitting unit."""
    if seconds is None:
        return NOTHING
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}\u202f{unit}"
    return f"{seconds:.0f}\u202fs"


def when(at: datetime | None) -> Markup:
    """Write a time; the script puts it into the reader's zone."""
    if at is None:
        return Markup(NOTHING)
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(at.isoformat(), at.strftime("%Y-%m-%d %H:%M"))


def shown(cell: Cell) -> Any:
    """Write a cell of a chart's table."""
    if isinstance(cell, datetime):
        return when(cell)
    return cell if isinstance(cell, str) else number(cell, 4)


def exact(cell: Cell) -> str:
    """Return what the script draws a cell from."""
    if isinstance(cell, datetime):
        return str(cell.timestamp() * 1000.0)
    return "" if cell is None else str(cell)


def short(digest: str | None) -> str:
    """Return the beginning of a digest."""
    return digest[:12] if digest else NOTHING


def words(name: str) -> str:
    """Write a stable key as words."""
    return name.replace("_", " ")


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_environment.filters |= {
    "number": number,
    "percent": percent,
    "duration": duration,
    "when": when,
    "shown": shown,
    "exact": exact,
    "short": short,
    "words": words,
}
_environment.tests["in_skill"] = lambda gate: gate.startswith(SKILL)
_environment.globals["NOTHING"] = NOTHING
