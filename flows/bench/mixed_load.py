"""People and operators at once: streamed answers, votes on them, pages that are looked at; and what went wrong."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from infra.settings import Settings

NUM_STREAMS = 3
ANSWER_TOKENS = 32
PAUSE_S = 0.2  # between an answer and the next question of the same person
PAGE_EVERY_S = 1.0
PAGES = (
    "/operate", "/operate/releases", "/operate/rollout", "/operate/learning", "/operate/feedback", "/operate/audit",
    "/", "/taught", "/v1/deployment", "/metrics",
)  # fmt: skip
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was accepted and not answered as it should be."""

    at_s: float
    what: str
    why: str


@dataclass(slots=True)
class MixedLoad:
    """The load, in a thread of its own, from entering the context to leaving it.

    Every request has a connection of its own: one that is kept may be closed by the server in the moment in which
    it is used again, which is no failure of the server's.

    Attributes
    ----------
    done
        Requests that were answered, by kind: ``answer``, ``vote``, ``page``.
    refused
        When a connection was refused (``time.monotonic``): nothing was accepted.
    """

    settings: Settings
    num_streams: int = NUM_STREAMS
    answer_tokens: int = ANSWER_TOKENS
    done: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, once all that was asked is answered."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    async def _run(self) -> None:
        options: dict[str, Any] = {
            "base_url": self.settings.need("public_url"),
            "headers": self.settings.credentials,
            "timeout": TIMEOUT_S,
            "limits": httpx.Limits(max_keepalive_connections=0),
        }
        async with httpx.AsyncClient(trust_env=False, **options) as client:
            people = [self._repeat(lambda: self._talk(client), PAUSE_S) for _ in range(self.num_streams)]
            await asyncio.gather(*people, self._repeat(lambda: self._look(client), PAGE_EVERY_S))

    async def _repeat(self, act: Callable[[], Coroutine[Any, Any, None]], pause_s: float) -> None:
        while not self._stop.is_set():
            await act()
            await asyncio.sleep(pause_s)

    async def _talk(self, client: httpx.AsyncClient) -> None:
        """Ask something, read the answer to its end, and vote on it."""
        number = next(self._numbers)
        user = f"soak-{number % 40}"
        episode: list[str] = []

        async def ask() -> str | None:
            body = {
                "model": "everloop",
                "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
                "user": user,
                "max_tokens": self.answer_tokens,
                "stream": True,
            }
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    return f"{response.status_code} {(await response.aread())[:200]!r}"
                whole = False
                async for line in response.aiter_lines():
                    whole = whole or line == "data: [DONE]"
                    if line.startswith("data: {") and not episode:
                        episode.append(orjson.loads(line[6:]).get("id", ""))
            return None if whole else "it was broken off"

        async def vote() -> str | None:
            key = uuid.uuid4().hex
            body = {"episode_id": episode[0], "user": user, "kind": "thumb", "idempotency_key": key}
            response = await client.post("/v1/feedback", json=body | {"value": 1 if number % 3 else -1})
            return None if response.status_code == 202 else f"{response.status_code} {response.text[:200]}"

        if await self._counted("answer", ask) and episode:
            await self._counted("vote", vote)

    async def _look(self, client: httpx.AsyncClient) -> None:
        page = PAGES[self.done["page"] % len(PAGES)]

        async def look() -> str | None:
            response = await client.get(page, headers={"X-Everloop-User": "soak-1"})
            return None if response.status_code == 200 else f"{page}: {response.status_code}"

        await self._counted("page", look)

    async def _counted(self, what: str, act: Callable[[], Coroutine[Any, Any, str | None]]) -> bool:
        """Do something, and note how it went; tell whether it went well."""
        try:
            why = await act()
        except httpx.ConnectError:
            self.refused.append(time.monotonic())
            return False
        except httpx.HTTPError as error:
            why = repr(error)
        if why is not None:
            self.failures.append(Failure(time.monotonic(), what, why))
            return False
        self.done[what] += 1
        return True
