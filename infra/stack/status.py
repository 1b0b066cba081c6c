"""What ``everloop status`` shows: each part, the loop from hop to hop, and what needs a decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.settings import Settings
from infra.stack.supervisor import PartStatus, Supervisor

TIMEOUT_S = 2.0
MAX_DECISIONS = 4
COLOURS = {"good": "green", "busy": "blue", "idle": "dim", "trouble": "red"}


def gather(settings: Settings) -> dict[str, Any]:
    """Return the state of the stack, as far as its parts answer.

    Returns
    -------
    dict
        ``running``, ``parts``; and if it runs ``url``, ``deployment`` and ``loop`` (each None where the API gives
        none).
    """
    supervisor = Supervisor(settings)
    if not supervisor.running():
        return {"running": False, "parts": []}
    api = httpx.Client(
        base_url=settings.public_url or "", headers=settings.credentials, timeout=TIMEOUT_S, trust_env=False
    )
    with api, ThreadPoolExecutor(2) as asking:  # all at once: a terminal waits
        deployment, loop = (asking.submit(_asked, api, path) for path in ("/v1/deployment", "/v1/loop"))
        parts = supervisor.status()
    return {
        "running": True,
        "url": settings.public_url,
        "parts": [asdict(part) for part in parts],
        "deployment": deployment.result(),
        "loop": loop.result(),
    }


def _asked(api: httpx.Client, path: str) -> dict[str, Any] | None:
    try:
        response = api.get(path)
        return dict(response.json()) if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def is_well(found: Mapping[str, Any]) -> bool:
    """Tell whether every part runs and the API answers."""
    return bool(found.get("deployment")) and all(part["state"] == "running" for part in found["parts"])


def view(found: Mapping[str, Any]) -> RenderableType:
    """Return the state as it is shown; it fits 80 columns and 24 lines."""
    if not found["running"]:
        return Text("not running; start it with `everloop up`", style="red")
    shown: list[RenderableType] = [_headline(found), Text(), _parts(found["parts"])]
    if loop := found["loop"]:
        shown += [Text(), _loop(loop["parts"]), Text(), *_decisions(loop["decisions"], str(found["url"]))]
    return Group(*shown)


def _headline(found: Mapping[str, Any]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{found['url']}  ", style="bold")
    deployment = found["deployment"]
    if deployment is None:
        return line.append("the API does not answer", style="red")
    line.append(f"champion {deployment['champion']}")
    if deployment["challenger"]:
        line.append(f", canary {deployment['challenger']} for {deployment['share']:.0%} of users")
    return line


def _parts(parts: list[dict[str, Any]]) -> Table:
    """Return the parts in two columns."""
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(2):
        table.add_column(no_wrap=True, min_width=10)
        table.add_column(no_wrap=True, min_width=8)
        table.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    half = (len(parts) + 1) // 2
    for left, right in zip(parts[:half], [*parts[half:], None], strict=False):
        table.add_row(*_part(left), *(_part(right) if right else ()))
    return table


def _part(part: dict[str, Any]) -> tuple[Text, Text, Text]:
    seen = PartStatus(**part)
    colour = "green" if seen.state == "running" else "red"
    told = f"{_duration(seen.uptime_s)}" + (f", {seen.restarts} restarts" if seen.restarts else "")
    return Text(seen.name), Text(seen.state, style=colour), Text(told, style="dim")


def _duration(seconds: int) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _loop(parts: Iterable[Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, min_width=8)
    table.add_column(no_wrap=True, ratio=2, overflow="ellipsis")
    table.add_column(no_wrap=True, ratio=4, overflow="ellipsis")
    for part in parts:
        figure = Text(str(part["figure"]), style=COLOURS.get(str(part["health"]), ""))
        table.add_row(Text(str(part["name"])), figure, Text(str(part["detail"])))
    return table


def _decisions(decisions: list[dict[str, Any]], url: str) -> list[Text]:
    if not decisions:
        return [Text("nothing needs a decision", style="dim")]
    lines = [Text("needs a decision", style="bold yellow")]
    for decision in decisions[:MAX_DECISIONS]:
        line = Text(f"  {decision['title']}", no_wrap=True, overflow="ellipsis", style="yellow")
        lines.append(line.append(f"  {decision['detail']}", style="dim"))
    more = len(decisions) - MAX_DECISIONS
    lines.append(Text(f"  {f'and {more} more; ' if more > 0 else ''}decide at {url}/operate", style="dim"))
    return lines
