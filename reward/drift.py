"""Has what people like changed? ADWIN on the prequential log loss.

The window of recent losses is kept as an exponential histogram. Where it can be cut into two parts whose means
differ by more than chance allows, people have changed (or the answers have): the older part is dropped, and the
learner widens its posterior, so that what comes counts more than what was.

References
----------
Bifet and Gavalda (2007), Learning from time-changing data with adaptive windowing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CONFIDENCE = 0.002
MAX_BUCKETS = 5  # of one size; then two become one of twice the size
CHECK_EVERY = 16
LEAST_PART = 16
MAX_LOSS = 3.0  # losses are clipped, so that one surprise is no drift


@dataclass(slots=True)
class Bucket:
    """A run of losses: how many, their sum, and the sum of their squared deviations."""

    count: int
    total: float
    spread: float

    def merged(self, other: Bucket) -> Bucket:
        """Return both as one."""
        count = self.count + other.count
        gap = self.total / self.count - other.total / other.count
        spread = self.spread + other.spread + gap * gap * self.count * other.count / count
        return Bucket(count, self.total + other.total, spread)


@dataclass(slots=True)
class Adwin:
    """A window that shrinks when its older and newer part differ.

    Attributes
    ----------
    buckets
        Oldest first; sizes are powers of two.
    num_drifts
        How often it was cut.
    """

    buckets: list[Bucket] = field(default_factory=list)
    num_seen: int = 0
    num_drifts: int = 0

    def observe(self, loss: float) -> bool:
        """Take one loss; tell whether it rose between the window's parts (the older one is dropped then)."""
        self.num_seen += 1
        self.buckets.append(Bucket(1, min(loss, MAX_LOSS), 0.0))
        self._compress()
        return self.num_seen % CHECK_EVERY == 0 and self._cut()

    def _compress(self) -> None:
        size, end = 1, len(self.buckets)
        while True:
            start = end
            while start > 0 and self.buckets[start - 1].count == size:
                start -= 1
            if end - start <= MAX_BUCKETS:
                return
            self.buckets[start : start + 2] = [self.buckets[start].merged(self.buckets[start + 1])]
            size, end = 2 * size, start + 1

    def _cut(self) -> bool:
        """Drop older buckets while the rest differs from them; tell whether the loss rose."""
        rose = False
        while (cut := self._first_cut()) is not None:
            older, newer = cut
            rose = rose or newer > older
        self.num_drifts += rose
        return rose

    def _first_cut(self) -> tuple[float, float] | None:
        whole = _sum(self.buckets)
        if whole is None or whole.count < 2 * LEAST_PART:
            return None
        variance = whole.spread / whole.count
        chance = math.log(2.0 * math.log(whole.count) / CONFIDENCE)
        old_count, old_total = 0, 0.0
        for index, bucket in enumerate(self.buckets[:-1]):
            old_count += bucket.count
            old_total += bucket.total
            new_count = whole.count - old_count
            if old_count < LEAST_PART or new_count < LEAST_PART:
                continue
            inverse = 1.0 / old_count + 1.0 / new_count
            bound = math.sqrt(2.0 * inverse * variance * chance) + 2.0 / 3.0 * inverse * MAX_LOSS * chance
            older, newer = old_total / old_count, (whole.total - old_total) / new_count
            if abs(older - newer) > bound:
                del self.buckets[: index + 1]
                return older, newer
        return None


def _sum(buckets: list[Bucket]) -> Bucket | None:
    total: Bucket | None = None
    for bucket in buckets:
        total = bucket if total is None else total.merged(bucket)
    return total
