"""Tools of MCP servers: each server has a task that keeps a session with it, and begins anew when that ends."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import anyio
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, EmbeddedResource, TextContent, TextResourceContents

from agent.tools.mcp_transport import Ending, connection
from agent.tools.tool import MAX_DESCRIPTION_CHARS, Caller, Tool, ToolError
from infra.settings import McpServer

log = logging.getLogger("everloop.tools")

MAX_MESSAGE_BYTES = 4 * 1024**2
MAX_TOOLS = 128  # of one server; a list without end keeps nobody waiting
START_TIMEOUT_S = 30.0
FIRST_BACK_OFF_S, MAX_BACK_OFF_S = 0.5, 60.0
STEADY_S = 30.0  # a session that lasted so long was a good one: the next begins at once
MAX_TIMEOUTS = 2  # in a row; then the server itself is taken to hang


class Session:
    """A server of the settings, its tools, and whether it is there.

    Parameters
    ----------
    timeout_s
        After which a call is cancelled by whoever makes it.

    Attributes
    ----------
    tools
        Those that it has, as the model calls them: ``server__tool``. They stay while it is away.
    problems
        What is wrong with it, or with its tools, in sentences for the operator.
    """

    def __init__(self, name: str, server: McpServer, timeout_s: float) -> None:
        self.name = name
        self.server = server
        self.timeout_s = timeout_s
        self.tools: list[Tool] = []
        self.problems: list[str] = []
        self.listed = asyncio.Event()  # once: it has told its tools, or could not
        self._client: Client | None = None
        self._ending = Ending()
        self._num_timeouts = 0

    @property
    def is_there(self) -> bool:
        """Tell whether it can be called now."""
        return self._client is not None

    async def keep(self) -> None:
        """Have a session with the server for as long as this runs."""
        back_off_s = FIRST_BACK_OFF_S
        while True:
            began_s = asyncio.get_running_loop().time()
            self._ending, self._num_timeouts = Ending(), 0
            try:
                await self._live()
                reason = self._ending.reason
            except Exception as error:
                reason = _why(error)
            self.listed.set()
            self.problems = [f"The MCP server {self.name!r} is away ({reason}); it is tried again."]
            log.warning("MCP server %s is away: %s", self.name, reason)
            if asyncio.get_running_loop().time() - began_s > STEADY_S:
                back_off_s = FIRST_BACK_OFF_S
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, MAX_BACK_OFF_S)

    async def _live(self) -> None:
        try:
            async with connection_of(self.server, self._ending) as transport, _client(transport) as client:
                self._client = client
                with anyio.fail_after(START_TIMEOUT_S):
                    await self._list(client)
                self.listed.set()
                await self._ending.event.wait()
                self._client = None  # while the connection is taken down, nobody is to use it
        finally:
            self._client = None

    async def _list(self, client: Client) -> None:
        told: list[Any] = []
        cursor = None
        while True:
            page = await client.list_tools(cursor=cursor)
            told += page.tools
            cursor = page.next_cursor
            if cursor is None or len(told) >= MAX_TOOLS:
                break
        self.tools, self.problems = [], []
        for one in told[:MAX_TOOLS]:
            self._add(one)
        if len(told) > MAX_TOOLS or cursor is not None:
            self.problems.append(f"{self.name!r} has more than {MAX_TOOLS} tools; the others are left out.")

    def _add(self, told: Any) -> None:
        name = f"{self.name}__{re.sub(r'[^A-Za-z0-9_-]', '_', told.name)}"[:64]
        if any(tool.name == name for tool in self.tools):
            self.problems.append(f"{self.name!r} has two tools {name!r}; the first is kept.")
            return

        async def run(_: Caller, arguments: dict[str, Any]) -> Any:
            return await self.call(told.name, arguments)

        description = (told.description or told.title or told.name)[:MAX_DESCRIPTION_CHARS]
        try:
            self.tools.append(Tool(name, description, told.input_schema, run, self.name))
        except ValueError as error:
            self.problems.append(f"{name!r} is left out. {error}")

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """Call a tool by the server's name of it.

        Raises
        ------
        ToolError
            Where the server is away, dies meanwhile, refuses, or returns what is no text.
        """
        client, ending = self._client, self._ending
        if client is None or ending.reason:
            raise ToolError(f"{self.name} does not answer just now.")
        began_s = asyncio.get_running_loop().time()
        try:
            result = await client.call_tool(tool, arguments)
        except asyncio.CancelledError:  # its time is over, or its asker gone
            self._num_timeouts += asyncio.get_running_loop().time() - began_s >= 0.9 * self.timeout_s
            if self._num_timeouts >= MAX_TIMEOUTS:
                ending.end("does not answer")
            raise
        except MCPError as error:
            with anyio.move_on_after(0.1):  # why the connection is over is known a moment later
                if self.server.url is None and "closed" in error.message.lower():
                    await ending.event.wait()
            if ending.reason:
                raise ToolError(f"{self.name} {ending.reason}.") from None
            if self.server.url is not None and error.code < 0:
                await self._look(client, ending)
            raise ToolError(error.message[:500]) from None
        except Exception as error:
            ending.end(_why(error))
            raise ToolError(f"{self.name} {ending.reason}.") from None
        self._num_timeouts = 0
        return _content(result)

    async def _look(self, client: Client, ending: Ending) -> None:
        """See whether a server behind an address is there; of one that is not the session is over."""
        try:
            with anyio.fail_after(5.0):
                await client.list_tools(cache_mode="bypass")
        except Exception:
            ending.end("died")


def connection_of(server: McpServer, ending: Ending) -> Any:
    """Return the way to a server."""
    return connection(server, MAX_MESSAGE_BYTES, ending)


def _client(transport: Any) -> Client:
    return Client(_Open(transport), cache=None, read_timeout_seconds=None)


class _Open:
    """Streams that are open already, as the transport that a client expects."""

    def __init__(self, streams: Any) -> None:
        self.streams = streams

    async def __aenter__(self) -> Any:
        return self.streams

    async def __aexit__(self, *_: object) -> None:
        return None


def _content(result: CallToolResult) -> Any:
    texts = []
    for part in result.content:
        if isinstance(part, TextContent):
            texts.append(part.text)
        elif isinstance(part, EmbeddedResource) and isinstance(part.resource, TextResourceContents):
            texts.append(part.resource.text)
        else:
            raise ToolError(f"The tool returned what is no text ({part.type}).")
    text = "\n".join(texts)
    if result.is_error:
        raise ToolError(text[:2000] or "The tool failed and said nothing.")
    if not texts and result.structured_content is not None:
        return result.structured_content
    return text


def _why(error: BaseException) -> str:
    """Return what went wrong in a word; of a group, of its first. No message: it may hold a secret."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return "its program is not there"
    return f"failed: {type(error).__name__}"
