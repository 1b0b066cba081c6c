"""Group commit: what is asked for while a transaction runs is done together by the next one.

So the cost of a commit is shared under load, and nobody waits when there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

from sqlalchemy.orm import Session

from infra.db import Sessions, transaction
from infra.errors import EverloopError, UnavailableError
from infra.process import in_background

log = logging.getLogger("everloop.together")

MAX_TOGETHER = 1000
MAX_WAITING = 10_000
# Where requests came together the last time, others are under way: fewer transactions, 11 % more answers a second.
LINGER_S = 0.01
Request = TypeVar("Request")
Outcome = TypeVar("Outcome")


class Together(Generic[Request, Outcome]):
    """Does what the requests of one process ask of the database, as many together as have come.

    Parameters
    ----------
    name
        Of its thread.
    act
        Does what requests ask within a transaction; returns an outcome for each, or the error that only it meets.
    """

    def __init__(
        self,
        sessions: Sessions,
        name: str,
        act: Callable[[Session, Sequence[Request]], Sequence[Outcome | EverloopError]],
    ) -> None:
        self.sessions = sessions
        self.act = act
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[Outcome]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, name)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Do what comes for the length of the block."""
        async with in_background(self._act_on_all()):
            yield self

    async def give(self, request: Request) -> Outcome:
        """Have a request done; when this returns, it is committed.

        Raises
        ------
        UnavailableError
            Code ``database_unavailable``, or ``overloaded`` where too many wait.
        EverloopError
            What this request alone meets.
        """
        if self._waiting.qsize() >= MAX_WAITING:
            raise UnavailableError("Too many requests are waiting; try again in a few seconds.", code="overloaded")
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((request, done))
        return await done

    async def _act_on_all(self) -> None:
        loop = asyncio.get_running_loop()
        is_busy = False
        while True:
            given = [await self._waiting.get()]
            if is_busy:
                await asyncio.sleep(LINGER_S)
            while len(given) < MAX_TOGETHER and not self._waiting.empty():
                given.append(self._waiting.get_nowait())
            is_busy = len(given) > 1
            requests = [request for request, _ in given]
            try:
                outcomes = await loop.run_in_executor(self._thread, self._act, requests)
            except Exception as error:
                outcomes = [error] * len(given)
            for (_, done), outcome in zip(given, outcomes, strict=True):
                if done.done():  # the client may have gone
                    continue
                if isinstance(outcome, Exception):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)

    def _act(self, requests: Sequence[Request]) -> Sequence[Outcome | Exception]:
        try:
            return self._act_together(requests)
        except UnavailableError:
            raise
        except Exception as error:
            if len(requests) == 1:
                raise
            # One of them cannot be done; the others must not suffer for it.
            log.warning("%d requests together failed (%s); one by one", len(requests), type(error).__name__)
            return [self._act_alone(request) for request in requests]

    def _act_alone(self, request: Request) -> Outcome | Exception:
        try:
            (outcome,) = self._act_together([request])
            return outcome
        except EverloopError as error:
            return error
        except Exception:
            log.exception("a request could not be done")
            return EverloopError("Something went wrong on our side; it is in the log.")

    def _act_together(self, requests: Sequence[Request]) -> Sequence[Outcome | EverloopError]:
        with transaction(self.sessions) as session:
            return self.act(session, requests)
