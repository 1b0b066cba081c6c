"""All tools that the server knows: those built in, and those of the MCP servers in the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from agent.tools import builtin, levels
from agent.tools.levels import BUILT_IN
from agent.tools.tool import Tool
from infra.access.roles import ANONYMOUS
from infra.db import Sessions
from infra.errors import InvalidRequestError
from infra.process import in_background
from infra.settings import Settings, ToolLevel

if TYPE_CHECKING:
    from agent.tools.mcp_servers import Session


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool within one turn, and how far it may go there."""

    tool: Tool
    level: ToolLevel

    @property
    def label(self) -> str:
        """Return what its calls are counted under: a name that the settings know."""
        return self.tool.name if self.tool.source == BUILT_IN else self.tool.source


class Toolbox:
    """The tools of one API process.

    Parameters
    ----------
    more
        Tools of one's own, beside those built in.
    """

    def __init__(self, settings: Settings, sessions: Sessions, more: Iterable[Tool] = ()) -> None:
        self.settings = settings
        self.sessions = sessions
        self.own = {tool.name: tool for tool in (*builtin.tools(), *more)}
        self.servers: list[Session] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Keep a session with each MCP server for the length of the block; nobody waits for them."""
        if self.settings.mcp_servers:
            from agent.tools.mcp_servers import Session  # half a second, for whoever has any

            timeout_s = self.settings.tool_timeout_s
            self.servers = [Session(name, each, timeout_s) for name, each in self.settings.mcp_servers.items()]
        async with AsyncExitStack() as stack:
            for server in self.servers:
                await stack.enter_async_context(in_background(server.keep()))
            yield self

    async def listed(self, timeout_s: float) -> None:
        """Wait until each MCP server has told its tools, or could not."""
        waiting = [server.listed.wait() for server in self.servers]
        await asyncio.wait_for(asyncio.gather(*waiting), timeout_s)

    @property
    def tools(self) -> dict[str, Tool]:
        """All tools by name; of two with one name what is built in stands, then the server named first."""
        found = dict(self.own)
        for server in self.servers:
            for tool in server.tools:
                found.setdefault(tool.name, tool)
        return found

    @property
    def problems(self) -> list[str]:
        """What is wrong with MCP servers, in sentences for the operator."""
        return [problem for server in self.servers for problem in server.problems]

    def ceiling(self, tool: Tool) -> ToolLevel:
        """Return the most that a tool may do here."""
        return levels.ceiling(self.settings.tool_levels, tool.name, tool.source)

    def level(self, tool: Tool, user: str, chosen: ToolLevel | None, wanted: bool) -> ToolLevel:
        """Return what a tool may do for a user.

        Who has no name has nobody to ask, and no past: for them only what needs neither is left.
        """
        level = levels.effective(self.ceiling(tool), chosen, wanted=wanted or self.settings.offer_tools)
        if user == ANONYMOUS and (level == "ask" or tool.name == "search_past"):
            return "off"
        return level

    def offers(
        self, user: str, chosen: Mapping[str, ToolLevel], wanted: Collection[str] | None
    ) -> dict[str, Offer]:
        """Return the tools of one turn.

        Parameters
        ----------
        chosen
            The person's own levels.
        wanted
            The tools that the request names; None where it names none, and all that are on are meant.

        Raises
        ------
        InvalidRequestError
            Code ``unknown_tool`` for a name that no tool has.
        """
        tools = self.tools
        if unknown := sorted(set(wanted or ()) - tools.keys()):
            raise InvalidRequestError(
                f"There is no tool {unknown[0]!r} here. GET /v1/tools lists those that there are.",
                code="unknown_tool",
                param="server_tools",
            )
        found = {}
        for name, tool in tools.items():
            if wanted is not None and name not in wanted:
                continue
            level = self.level(tool, user, chosen.get(name), wanted is not None)
            if level != "off":
                found[name] = Offer(tool, level)
        return found
