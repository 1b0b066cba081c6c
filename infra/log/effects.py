"""What consumers tell: events that had their effect, how soon after they happened, and their traces."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Self

from prometheus_client import Counter, Histogram
from pydantic import BaseModel

from infra.events import Event
from infra.log.reading import Envelope
from infra.telemetry import tracing
from infra.telemetry.tracing import Hop

APPLIED = Counter("everloop_consumer_events", "Events whose effect a consumer has committed.", ["consumer", "type"])
GIVEN_UP = Counter("everloop_consumer_dead_letters", "Records that a consumer gave up.", ["consumer"])
EVENT_TO_EFFECT = Histogram(
    "everloop_consumer_event_to_effect_seconds",
    "From an event's time to the commit of its effect; after a replay that is long.",
    ["consumer", "type"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
ID_FIELDS = ("episode_id", "feedback_id", "run_id")


class Effects:
    """One transaction of a consumer: what comes of it is told when it has been committed, and not otherwise."""

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self._opened: Sequence[tuple[Envelope, BaseModel]] = ()
        self._hops: list[Hop] = []

    def follow(self, opened: Sequence[tuple[Envelope, BaseModel]]) -> None:
        """Take the events that are about to have their effect; what they cause goes on in their traces."""
        self._opened = opened
        if tracing.is_on():
            for envelope, event in opened:
                self._begin(envelope, event)

    def _begin(self, envelope: Envelope, event: BaseModel) -> None:
        parent = tracing.valid(envelope.content.get(tracing.HEADER))
        if parent is None:
            return
        ids = {f"everloop__{name}": getattr(event, name, None) for name in ID_FIELDS}
        name = f"{self.consumer} {envelope.event_class.type}"
        hop = tracing.begin(name, "CONSUMER", parent, everloop__event_id=envelope.event_id)
        if hop is not None:
            hop.note(**ids)
            self._hops.append(hop)
            if isinstance(event, Event):
                event.happened_in(hop.traceparent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, stack: object) -> None:
        for hop in self._hops:
            hop.end(error)
        if error is not None:
            return
        now = datetime.now(UTC)
        for envelope, _ in self._opened:
            labels = (self.consumer, envelope.event_class.type)
            APPLIED.labels(*labels).inc()
            age_s = _age_s(envelope, now)
            if age_s is not None:
                EVENT_TO_EFFECT.labels(*labels).observe(age_s)


def _age_s(envelope: Envelope, now: datetime) -> float | None:
    """Return how long ago an event happened; None where its time, which anybody may have written, is none."""
    try:
        at = datetime.fromisoformat(str(envelope.content.get("time")))
        return max((now - at).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):  # not a time, or one without a zone
        return None
