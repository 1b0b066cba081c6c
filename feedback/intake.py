"""The intake: signals that arrive while a transaction runs are written together by the next one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Self

from sqlalchemy.orm import Session

from feedback.acceptance import Outcome, accept_many
from feedback.signals import BaseSignal
from infra.db import Sessions
from infra.errors import EverloopError, UnavailableError
from infra.together import Together


class Intake:
    """Writes the signals of one API process, as many together as have come."""

    def __init__(self, sessions: Sessions) -> None:
        self._together: Together[Sequence[BaseSignal], list[Outcome]] = Together(sessions, "intake", _write)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Write what comes for the length of the block."""
        async with self._together.running():
            yield self

    async def give(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        """Accept signals; when this returns, they are safe in the log.

        Raises
        ------
        UnavailableError
            Code ``database_unavailable``, or ``overloaded`` where too many wait.
        """
        try:
            return await self._together.give(signals)
        except UnavailableError:
            raise
        except EverloopError as error:
            return [error] * len(signals)


def _write(session: Session, requests: Sequence[Sequence[BaseSignal]]) -> list[list[Outcome]]:
    outcomes = iter(accept_many(session, [signal for signals in requests for signal in signals]))
    return [[next(outcomes) for _ in signals] for signals in requests]
