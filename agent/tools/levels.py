"""How far a tool may go: not at all, after somebody said yes, or by itself.

The operator's ceiling comes first, a person's own choice can only lower it, and a request can only choose among
what both leave. Nothing that a model writes or a tool returns is an input here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from infra.settings import ToolLevel

LEVELS: tuple[ToolLevel, ...] = get_args(ToolLevel)
BUILT_IN = "built in"


def lesser(one: ToolLevel, other: ToolLevel) -> ToolLevel:
    """Return the level of the two that lets a tool do less."""
    return min(one, other, key=LEVELS.index)


def ceiling(configured: Mapping[str, ToolLevel], name: str, source: str) -> ToolLevel:
    """Return the most that a tool may do, as the operator says: by its name, its server's, or its sort."""
    if name in configured:
        return configured[name]
    if source == BUILT_IN:
        return "auto"
    return configured.get(f"{source}__*", "ask")


def effective(highest: ToolLevel, chosen: ToolLevel | None, *, wanted: bool) -> ToolLevel:
    """Return what a tool may do in one turn.

    Parameters
    ----------
    highest
        The operator's ceiling.
    chosen
        What the person chose, if they did.
    wanted
        Whether the request names the tool, or the deployment offers tools to all: it stands for a choice of who
        made none, and never above one.
    """
    if chosen is not None:
        return lesser(highest, chosen)
    return highest if wanted else "off"
