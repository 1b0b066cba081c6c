"""The two ways to an MCP server, each with a limit on what one message may weigh.

The official package reads a line, or a body, of any length into memory; a server that returns fifty megabytes would
hold up everybody's answers. What is longer than the limit ends the connection, and with it the call.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import httpx2
from anyio.abc import Process
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from infra.settings import McpServer

GRACE_S = 2.0  # a child that does not end when its input does is killed after this
CONNECT_TIMEOUT_S = 5.0


class Ending:
    """Why a connection is over, and that it is."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.reason = ""

    def end(self, reason: str) -> None:
        """Note that it is over; the first reason stands."""
        self.reason = self.reason or reason
        self.event.set()


@asynccontextmanager
async def connection(server: McpServer, max_bytes: int, ending: Ending) -> AsyncIterator[Any]:
    """Open the streams to a server for the length of the block."""
    if server.command is not None:
        async with _child(server, max_bytes, ending) as streams:
            yield streams
        return
    assert server.url is not None
    transport = _Limited(max_bytes, ending)
    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)  # a call has a limit of its own
    async with (
        httpx2.AsyncClient(headers=server.headers, timeout=timeout, transport=transport, trust_env=False) as http,
        streamable_http_client(server.url, http_client=http, max_sse_event_size=max_bytes) as streams,
    ):
        yield streams


@asynccontextmanager
async def _child(server: McpServer, max_bytes: int, ending: Ending) -> AsyncIterator[Any]:
    """Start a program and speak with it over its standard input and output.

    It sees PATH, HOME and the like and what the settings give it, nothing else of our environment: no address, key
    or password of ours. What it writes to standard error goes into the API's log.
    """
    assert server.command is not None
    process = await anyio.open_process(
        [server.command, *server.args],
        env=get_default_environment() | server.env,
        stderr=None,
        start_new_session=True,
    )
    to_us, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, from_us = anyio.create_memory_object_stream[SessionMessage](0)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, to_us, max_bytes, ending)
            tasks.start_soon(_write, process, from_us, ending)
            yield incoming, outgoing
            tasks.cancel_scope.cancel()
    finally:
        for stream in (to_us, incoming, outgoing, from_us):
            stream.close()
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def _read(process: Process, to_us: Any, max_bytes: int, ending: Ending) -> None:
    assert process.stdout is not None
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with to_us:
            async for block in process.stdout:
                *whole, rest = block.split(b"\n")
                for line in whole:
                    await to_us.send(_message(b"".join([*parts, line])))
                    parts, num_bytes = [], 0
                parts.append(rest)
                num_bytes += len(rest)
                if num_bytes > max_bytes:
                    ending.end(f"returned more than {max_bytes} bytes")
                    return
    except (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
        pass
    finally:
        ending.end("died")


def _message(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line))
    except ValueError as error:
        return error


async def _write(process: Process, from_us: Any, ending: Ending) -> None:
    assert process.stdin is not None
    try:
        async with from_us:
            async for outgoing in from_us:
                body = outgoing.message.model_dump_json(by_alias=True, exclude_unset=True)
                await process.stdin.send(body.encode() + b"\n")
    except (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
        ending.end("died")


async def _stop(process: Process) -> None:
    """End a child and whatever it started: politely, then not."""
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
        if process.stdin is not None:
            await process.stdin.aclose()
    with anyio.move_on_after(GRACE_S):
        await process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.aclose()


class _Limited(httpx2.AsyncHTTPTransport):
    """A transport that ends a body which is too long; a stream of events has a limit for each."""

    def __init__(self, max_bytes: int, ending: Ending) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.ending = ending

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Counted(response.stream, self.max_bytes, self.ending)
        return response


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, max_bytes: int, ending: Ending) -> None:
        self.stream = stream
        self.max_bytes = max_bytes
        self.ending = ending

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for block in self.stream:
            num_bytes += len(block)
            if num_bytes > self.max_bytes:
                self.ending.end(f"returned more than {self.max_bytes} bytes")
                raise httpx2.ReadError(f"more than {self.max_bytes} bytes")
            yield block

    async def aclose(self) -> None:
        await self.stream.aclose()
