"""People first: how many samples a run may have in flight, by what else the engine has to do."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from infra.engine import EngineClient
from infra.errors import EverloopError

log = logging.getLogger("everloop.night")

LOOK_EVERY_S = 0.2
QUIET_S = 2.0  # a person who has just read an answer is likely to ask again


@dataclass(slots=True)
class Throttle:
    """Lets samples pass: as many as the engine holds while nobody else asks, only a few at a time while people do.

    Parameters
    ----------
    most, least
        Samples in flight when the engine is ours, and when it is not.

    Attributes
    ----------
    held_s
        Time for which somebody else's requests kept it down.
    """

    most: int
    least: int
    held_s: float = 0.0
    _in_flight: int = 0
    _quiet_since_s: float = -math.inf
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def limit(self) -> int:
        """Samples that may be in flight now."""
        return self.most if time.monotonic() - self._quiet_since_s >= QUIET_S else self.least

    async def look(self, engine: EngineClient) -> None:
        """See whether the engine has more to do than what is ours; where it does not tell, nothing is held back."""
        try:
            if await engine.num_requests() > self._in_flight:
                self._quiet_since_s = time.monotonic()
        except EverloopError as error:
            log.debug("the engine's queue cannot be seen: %s", error.code)

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait until one more sample may be in flight."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
        try:
            yield
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    async def watch(self, engine: EngineClient) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look(engine)
            if self.limit < self.most:
                self.held_s += LOOK_EVERY_S
            async with self._changed:
                self._changed.notify_all()
