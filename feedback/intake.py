"""The intake: signals that arrive while a transaction runs are written together by the next one.

So the cost of a commit is shared under load, and nobody waits when there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from feedback.acceptance import Outcome, accept_many
from feedback.signals import BaseSignal
from infra.db import Sessions, transaction
from infra.errors import EverloopError, UnavailableError

log = logging.getLogger("everloop.feedback")

MAX_TOGETHER = 1000
MAX_WAITING = 10_000


class Intake:
    """Writes the signals of one API process, as many together as have come."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._waiting: asyncio.Queue[tuple[Sequence[BaseSignal], asyncio.Future[list[Outcome]]]] = asyncio.Queue()
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, "intake")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Write what comes for the length of the block."""
        writer = asyncio.create_task(self._write_all())
        try:
            yield self
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def give(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        """Accept signals; when this returns, they are safe in the log.

        Raises
        ------
        UnavailableError
            Code ``database_unavailable``, or ``overloaded`` where too many wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise UnavailableError(
                "Too many signals are waiting to be written; try again in a few seconds.", code="overloaded"
            )
        self._num_waiting += len(signals)
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((signals, done))
        try:
            return await done
        finally:
            self._num_waiting -= len(signals)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            requests = [await self._waiting.get()]
            size = len(requests[0][0])
            while size < MAX_TOGETHER and not self._waiting.empty():
                requests.append(self._waiting.get_nowait())
                size += len(requests[-1][0])
            try:
                outcomes = await loop.run_in_executor(self._thread, self._write, [given for given, _ in requests])
            except Exception as error:
                for _, done in requests:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), outcome in zip(requests, outcomes, strict=True):
                if not done.done():  # the client may have gone
                    done.set_result(outcome)

    def _write(self, requests: Sequence[Sequence[BaseSignal]]) -> list[list[Outcome]]:
        try:
            outcomes = iter(self._write_together([signal for signals in requests for signal in signals]))
            return [[next(outcomes) for _ in signals] for signals in requests]
        except UnavailableError:
            raise
        except Exception as error:
            if len(requests) == 1:
                raise
            # One of them cannot be written; the others must not suffer for it.
            log.warning("%d requests together failed (%s); one by one", len(requests), type(error).__name__)
            return [self._write_alone(signals) for signals in requests]

    def _write_alone(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        try:
            return self._write_together(signals)
        except EverloopError as error:
            return [error] * len(signals)
        except Exception:
            log.exception("a request could not be written")
            return [EverloopError("Something went wrong on our side; it is in the log.")] * len(signals)

    def _write_together(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        with transaction(self.sessions) as session:
            return accept_many(session, signals)
