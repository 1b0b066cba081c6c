"""A small HTTP client for loads: so light that it measures the server and not itself."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_CONTENT = re.compile(rb'"content": ?"[^"]')


@dataclass(slots=True)
class Measured:
    """What a load found.

    Attributes
    ----------
    first_token_s, whole_s
        Of each answer: seconds to the first of it, and to its end.
    failures
        What was answered otherwise than with 200.
    """

    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)


async def load(
    url: str,
    body_of: Callable[[int], dict[str, Any]],
    *,
    num_connections: int,
    num_requests: int | None = None,
    seconds: float | None = None,
    path: str = "/v1/chat/completions",
    num_tokens_of: Callable[[bytes], int] = lambda body: 0,
    headers: Mapping[str, str] | None = None,
) -> Measured:
    """Keep `num_connections` connections busy, for so many requests or so long.

    Parameters
    ----------
    body_of
        Returns the body of the request of a number.
    """
    parts = urlsplit(url)
    found = Measured()
    numbers = iter(range(num_requests if num_requests is not None else 10**9))
    began_s = time.perf_counter()
    own = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for number in numbers:
            if seconds is not None and time.perf_counter() - began_s > seconds:
                break
            body = json.dumps(body_of(number)).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n{own}"
            asked_s = time.perf_counter()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status, first_s, answer = await _answer(reader)
            found.first_token_s.append(first_s - asked_s)
            found.whole_s.append(time.perf_counter() - asked_s)
            if status != 200:
                found.failures.append(f"{status} {answer[:200].decode(errors='replace')}")
            found.num_tokens += num_tokens_of(answer)
        writer.close()

    await asyncio.gather(*(one_connection() for _ in range(num_connections)))
    found.seconds = time.perf_counter() - began_s
    return found


async def _answer(reader: asyncio.StreamReader) -> tuple[int, float, bytes]:
    """Return status, time of the first block that holds anything of the answer, and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status = int(head.split(" ", 2)[1])
    if "transfer-encoding: chunked" not in head:
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        body = await reader.readexactly(length)
        return status, time.perf_counter(), body
    first_s, blocks = 0.0, []
    while size := int(await reader.readline(), 16):
        blocks.append(await reader.readexactly(size))
        if not first_s and _CONTENT.search(blocks[-1]):
            first_s = time.perf_counter()
        await reader.readline()
    await reader.readline()
    return status, first_s, b"".join(blocks)
