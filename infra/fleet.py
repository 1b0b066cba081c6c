"""The fleet: any number of engines, of which each request goes to one that may serve it, is well and has least
to do.

Who may serve a release is told from outside (:class:`Routes`): a replica that has not proved that it holds a
release gets no request for it. A request is tried elsewhere only while nothing of its answer has been seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from infra.breaker import Breaker
from infra.engine import EngineClient
from infra.engine_wire import MODEL_GONE, EngineError
from infra.errors import EverloopError, UnavailableError
from infra.process import in_background
from infra.settings import Settings

log = logging.getLogger("everloop.fleet")
_found_last: dict[str, list[str]] = {}
T = TypeVar("T")

LOOK_EVERY_S = 1.0
# A conversation stays with the replica that has its beginning in the cache, unless that has so much more to do.
AFFINITY_REQUESTS = 4
RETRIED_CODES = ("engine_failed", "engine_error", "engine_unavailable", MODEL_GONE)
Routes = Callable[[str], Mapping[str, str]]
"""For a release: the addresses of the replicas that have proved that they hold it, and what each calls it."""


class Replica:
    """One engine, as this process sees it.

    Attributes
    ----------
    is_well
        Whether it answered the last time that it was looked at.
    num_others
        Requests of others than this process that it had then.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url
        self.client = EngineClient(url, key, timeout_s=timeout_s)
        self.breaker = Breaker()
        self.is_well = True
        self.num_others = 0

    @property
    def load(self) -> int:
        """Requests that it has, as far as known."""
        return self.client.num_streams + self.num_others

    async def look(self) -> None:
        """See whether it answers, and how much it has to do."""
        ours = self.client.num_streams
        try:
            self.num_others = max(await self.client.num_requests() - ours, 0)
            self.is_well = True
        except Exception as error:
            if self.is_well:
                log.warning("%s does not answer: %s", self.url, getattr(error, "code", type(error).__name__))
            self.is_well = False


class Fleet:
    """The engines that the settings name or that are found, and a way to ask one of them.

    Parameters
    ----------
    routes, refresh
        Who may serve what, as last read; and to read it anew, where nobody may: a release is named as soon as it is
        proved.
    """

    def __init__(self, settings: Settings, routes: Routes, refresh: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.routes = routes
        self.refresh = refresh
        self.replicas: dict[str, Replica] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Watch the replicas for the length of the block."""
        await self._find()
        try:
            async with in_background(self._watch()):
                yield self
        finally:
            for replica in self.replicas.values():
                await replica.client.close()

    async def _watch(self) -> None:
        looks: dict[str, asyncio.Task[None]] = {}  # one that hangs keeps nobody from seeing that another is down
        try:
            while True:
                for url, replica in self.replicas.items():
                    if url not in looks or looks[url].done():
                        looks[url] = asyncio.create_task(replica.look())
                await asyncio.sleep(LOOK_EVERY_S)
                await self._find()
        finally:
            for look in looks.values():
                look.cancel()
            await asyncio.gather(*looks.values(), return_exceptions=True)

    async def _find(self) -> None:
        urls = await addresses(self.settings)
        for url in urls:
            if url not in self.replicas:
                self.replicas[url] = Replica(url, self.settings.engine_key, self.settings.engine_timeout_s)
        for url in self.replicas.keys() - set(urls):
            if not self.replicas[url].client.num_streams:  # what it is answering, it may end
                await self.replicas.pop(url).client.close()

    @property
    def idle_s(self) -> float:
        """Seconds since the last chat stream through this process ended; 0 while one is open."""
        return min((replica.client.idle_s for replica in self.replicas.values()), default=math.inf)

    async def num_requests(self) -> int:
        """Return how many sequences all replicas work on or have in their queues, as last seen."""
        return sum(replica.load for replica in self.replicas.values())

    async def models(self) -> list[str]:
        """Return the names that any replica holds now, which need not be proved."""
        asked = [replica.client.models() for replica in self.replicas.values()]
        told = await asyncio.gather(*asked, return_exceptions=True)
        problems = [answer for answer in told if isinstance(answer, BaseException)]
        if len(problems) == len(told) and problems:
            raise problems[0]
        return sorted({name for answer in told if not isinstance(answer, BaseException) for name in answer})

    async def proved(self, release: str) -> Mapping[str, str]:
        """Return the replicas that have proved a release, and what each calls it."""
        if not self.routes(release):
            await asyncio.to_thread(self.refresh)
        return self.routes(release)

    async def serves(self, release: str) -> bool:
        """Tell whether any replica that is well has proved a release."""
        return bool(self._ranked(await self.proved(release), affinity=""))

    async def p_yes(self, release: str, messages: Sequence[dict[str, Any]]) -> float:
        """Ask a replica for the probability of Yes (:meth:`infra.engine.EngineClient.p_yes`)."""

        async def ask(replica: Replica, name: str) -> float:
            p_good = await replica.client.p_yes(name, messages)
            replica.breaker.succeed()
            return p_good

        return await self._try_each(release, "", ask)

    @asynccontextmanager
    async def stream_chat(
        self,
        release: str,
        payload: dict[str, Any],
        affinity: str = "",
        routes: Mapping[str, str] | None = None,
        *,
        at_once: bool = False,
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Open a chat completion stream; leaving the block early makes the engine stop generating.

        Parameters
        ----------
        at_once
            Have the whole answer in one chunk; the engine stops if this is cancelled while it is opened.
        affinity
            Requests of the same key go to the same replica while that has not much more to do than others.
        routes
            Who holds the release, instead of those who have proved it.

        Yields
        ------
        AsyncIterator[dict]
            The ``chat.completion.chunk`` objects.

        Raises
        ------
        UnavailableError
            Code ``engine_unavailable`` where no replica answers, ``release_loading`` where none has proved yet that
            it holds the release.
        """
        async with contextlib.AsyncExitStack() as stack:

            async def open_stream(replica: Replica, name: str) -> AsyncIterator[dict[str, Any]]:
                attempt = contextlib.AsyncExitStack()
                try:
                    chat = replica.client.chat_at_once if at_once else replica.client.stream_chat
                    chunks = await attempt.enter_async_context(chat({**payload, "model": name}))
                    first = await _until_first_token(chunks)
                except BaseException:
                    await attempt.aclose()
                    raise
                replica.breaker.answer()
                stack.push_async_callback(attempt.aclose)
                return _noting(replica, first, chunks)

            yield await self._try_each(release, affinity, open_stream, routes)

    async def _try_each(
        self,
        release: str,
        affinity: str,
        ask: Callable[[Replica, str], Awaitable[T]],
        routes: Mapping[str, str] | None = None,
    ) -> T:
        names = await self.proved(release) if routes is None else routes
        problem: EverloopError | None = None
        for replica in self._ranked(names, affinity):
            if not replica.breaker.allows:  # another request found it failing, or is trying it, meanwhile
                continue
            replica.breaker.begin()
            try:
                answer = await ask(replica, names[replica.url])
            except EverloopError as error:
                if error.code not in RETRIED_CODES:
                    replica.breaker.succeed()  # it answered: the request was wrong
                    raise
                if error.code != MODEL_GONE:
                    replica.breaker.fail()
                log.warning("%s could not answer: %s", replica.url, error.code)
                problem = error
            except BaseException:
                replica.breaker.abandon()
                raise
            else:
                return answer
        raise problem or self._nobody(names)

    def _ranked(self, names: Mapping[str, str], affinity: str) -> list[Replica]:
        """Return the replicas that may be asked, the best first."""
        able = [self.replicas[url] for url in names if url in self.replicas]
        able = [replica for replica in able if replica.is_well and replica.breaker.allows]
        if not able:
            return []
        able.sort(key=lambda replica: (replica.load, replica.url))
        if affinity:
            home = max(able, key=lambda replica: _weight(replica.url, affinity))
            if home.load <= able[0].load + AFFINITY_REQUESTS:
                able.remove(home)
                able.insert(0, home)
        return able

    def _nobody(self, names: Mapping[str, str]) -> UnavailableError:
        if any(replica.is_well and replica.breaker.allows for replica in self.replicas.values()) and not any(
            url in self.replicas and self.replicas[url].is_well for url in names
        ):
            return UnavailableError("The engine is loading the release; try again.", code=MODEL_GONE)
        return UnavailableError(
            "No engine answers. Feedback still works; try the chat again in a few seconds.",
            code="engine_unavailable",
        )


async def addresses(settings: Settings) -> list[str]:
    """Return the addresses of the engines: those that the settings name, and those that they say how to find."""
    urls = [settings.need("engine_url").rstrip("/"), *(url.rstrip("/") for url in settings.engine_replicas)]
    if settings.engine_discovery:
        urls += await _discover(settings.engine_discovery)
    return list(dict.fromkeys(urls))


async def _discover(url: str) -> list[str]:
    """Return one address for each that the host name of `url` stands for, now or when it was last known."""
    parts = urlsplit(url)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 80, proto=6)
    except OSError as error:  # those that were found before are there all the same
        log.warning("%s is not found: %s", parts.hostname, error)
        return _found_last.get(url, [])
    hosts = sorted({str(entry[4][0]) for entry in found})
    netlocs = [f"[{host}]:{parts.port or 80}" if ":" in host else f"{host}:{parts.port or 80}" for host in hosts]
    _found_last[url] = [urlunsplit(parts._replace(netloc=netloc)).rstrip("/") for netloc in netlocs]
    return _found_last[url]


def _weight(url: str, affinity: str) -> bytes:
    """Rank replicas for a key (rendezvous hashing: when one comes or goes, only its own keys move)."""
    return hashlib.sha256(f"{url}\0{affinity}".encode()).digest()


async def _until_first_token(chunks: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the chunks up to the first that holds anything of the answer.

    Raises
    ------
    EngineError
        The stream ended before that.
    """
    seen = []
    async for chunk in chunks:
        seen.append(chunk)
        for choice in chunk["choices"]:
            if choice["delta"].get("content") or choice.get("token_ids") or choice.get("finish_reason"):
                return seen
    raise EngineError("The engine ended the answer before it began.", code="engine_failed")


async def _noting(
    replica: Replica, first: list[dict[str, Any]], rest: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    """Yield chunks; what breaks off is noted, and not tried again: its beginning has been seen."""
    for chunk in first:
        yield chunk
    try:
        async for chunk in rest:
            yield chunk
    except EverloopError:
        replica.breaker.fail()
        raise
    replica.breaker.succeed()
