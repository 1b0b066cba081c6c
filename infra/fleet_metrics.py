"""The engines as one gateway sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from infra.fleet import Fleet
from infra.telemetry.exposition import FigureCollector, Sample


class FleetCollector(FigureCollector):
    """Of each engine whether it answers, whether it is left alone for a while, and how much it has to do."""

    figures: ClassVar = {
        "everloop_engine_up": ("Whether the engine answered this gateway's last look.", "replica"),
        "everloop_engine_breaker_open": ("Whether it is left alone after failures.", "replica"),
        "everloop_engine_load_requests": ("Requests that it has, of everybody's.", "replica"),
    }

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def samples(self) -> Iterator[Sample]:
        for url, replica in list(self.fleet.replicas.items()):
            label = {"replica": url}
            yield "everloop_engine_up", label, float(replica.is_well)
            yield "everloop_engine_breaker_open", label, float(not replica.breaker.allows)
            yield "everloop_engine_load_requests", label, replica.load
