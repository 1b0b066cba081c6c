"""People first: how many samples a run may have in flight, by what else the engine has to do.

When somebody asks while the engine is full of samples, all but a few are given up and asked for again later: an
answer that somebody waits for is worth more than the seconds that were spent on them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra.engine import EngineClient
from infra.errors import EverloopError

log = logging.getLogger("everloop.night")

LOOK_EVERY_S = 0.2
QUIET_S = 5.0  # a person who has just read an answer is likely to ask again

T = TypeVar("T")


class _Ours:
    """How many samples all throttles of this process have in flight: a run that samples ahead has several."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.count += number


_ours = _Ours()


@dataclass(slots=True)
class Throttle:
    """Lets samples pass: as many as the engine holds while nobody else asks, only a few at a time while people do.

    Parameters
    ----------
    most, least
        Samples in flight when the engine is ours, and when it is not.

    Attributes
    ----------
    num_given_up
        Samples that made room for people, and were asked for again.
    """

    most: int
    least: int
    num_given_up: int = 0
    _in_flight: list[asyncio.Task[Any]] = field(default_factory=list)
    _quiet_since_s: float = -math.inf
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def limit(self) -> int:
        """Samples that may be in flight now."""
        return self.most if time.monotonic() - self._quiet_since_s >= QUIET_S else self.least

    async def look(self, engine: EngineClient) -> None:
        """See whether the engine has more to do than what is ours; where it does not tell, nothing is held back."""
        ours = _ours.count
        try:
            others = await engine.num_requests() - max(ours, _ours.count)
        except EverloopError as error:
            log.debug("the engine's queue cannot be seen: %s", error.code)
            return
        if others > 0:
            self._quiet_since_s = time.monotonic()
            for task in self._in_flight[self.least :]:  # the newest have got least far
                task.cancel()

    async def run(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Ask once there is room, again if it was given up, and return what came."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._in_flight) < self.limit)
                task = asyncio.create_task(ask())
                self._in_flight.append(task)
                _ours.add(1)
            try:
                return await task
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if caller is not None and caller.cancelling():  # not the sample was given up, but all of them
                    raise
                self.num_given_up += 1
            finally:
                self._in_flight.remove(task)
                _ours.add(-1)
                async with self._changed:
                    self._changed.notify_all()

    async def watch(self, engine: EngineClient) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look(engine)
            async with self._changed:
                self._changed.notify_all()
