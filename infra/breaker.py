"""A circuit breaker: who fails again and again is left alone for a while."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


class Breaker:
    """Leaves a failing replica alone after some failures in a row, for a time that doubles; then one request tries.

    Parameters
    ----------
    clock
        Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._closed_again_s = -math.inf
        self._is_tried = False

    @property
    def allows(self) -> bool:
        """Whether a request may be tried."""
        return self._clock() >= self._closed_again_s

    def begin(self) -> None:
        """Note that a request is sent; after a pause the others wait for what it says, as long as the last time."""
        if self._failures >= FAILURES_TO_OPEN:
            self._is_tried = True
            self._pause()

    def answer(self) -> None:
        """Note that an answer has begun: others may be sent, and one more failure leaves it alone again."""
        self._failures = min(self._failures, FAILURES_TO_OPEN - 1)
        self._closed_again_s, self._is_tried = -math.inf, False

    def abandon(self) -> None:
        """Note that whoever tried it went away: another may try."""
        if self._is_tried:
            self._closed_again_s, self._is_tried = -math.inf, False

    def succeed(self) -> None:
        """Note a whole answer."""
        self._failures, self._closed_again_s, self._is_tried = 0, -math.inf, False

    def fail(self) -> None:
        """Note a failure; of those that were sent before it was left alone, no more."""
        if not (self.allows or self._is_tried):
            return
        self._is_tried = False
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            self._pause()

    def _pause(self) -> None:
        over = self._failures - FAILURES_TO_OPEN
        self._closed_again_s = self._clock() + min(FIRST_PAUSE_S * 2.0 ** min(over, 16), LONGEST_PAUSE_S)
