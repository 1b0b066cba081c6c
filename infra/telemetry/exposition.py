"""``/metrics`` of a process, and metrics that are read from the database when they are asked for."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from infra.db import DATABASE_AWAY, Sessions
from infra.settings import Settings

log = logging.getLogger("everloop.metrics")

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]


def serve(settings: Settings, *collectors: Collector, registry: CollectorRegistry = REGISTRY) -> int | None:
    """Serve this process's metrics in a thread, where the settings name a port; return it.

    A process that cannot be looked at works on: a port that is taken is a line in the log.
    """
    # When each series began would be half as many series again, and rates do without.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    for collector in collectors:
        registry.register(collector)
    if settings.metrics_port is None:
        return None
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except OSError as error:
        log.error(
            "no metrics: %s:%d cannot be had (%s)", settings.metrics_host, settings.metrics_port, error.strerror
        )
        return None
    return settings.metrics_port


@contextmanager
def telling(*collectors: Collector, registry: CollectorRegistry = REGISTRY) -> Iterator[None]:
    """Tell what collectors find, for the length of the block."""
    for collector in collectors:
        registry.register(collector)
    try:
        yield
    finally:
        for collector in collectors:
            registry.unregister(collector)


class FigureCollector(Collector):
    """Figures that are found when they are asked for.

    Subclasses list them in ``figures`` (name: what it is, then its labels; a counter's name ends in ``_total``) and
    yield their samples in :meth:`samples`. A figure without samples is shown with its help alone.
    """

    figures: ClassVar[Mapping[str, Sequence[str]]] = {}

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield name, labels and value of each sample."""

    def describe(self) -> Iterator[Metric]:
        """Yield the figures without asking anybody for samples."""
        yield from self._families().values()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures with their samples."""
        families = self._families()
        for name, labels, value in self.samples():
            order = self.figures[name][1:]
            families[name].add_metric([labels[label] for label in order], value)
        yield from families.values()

    def _families(self) -> dict[str, CounterMetricFamily | GaugeMetricFamily]:
        return {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                name, help_text, labels=labels
            )
            for name, (help_text, *labels) in self.figures.items()
        }


class DatabaseCollector(FigureCollector):
    """Figures of the database. Without it there is none but ``up``, which says so.

    Attributes
    ----------
    up
        The name of the figure that says whether the database answered.
    """

    up: ClassVar[str]

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    @abstractmethod
    def read(self, session: Session) -> Iterator[Sample]:
        """Yield the samples; every query is served by an index or a small table."""

    def samples(self) -> Iterator[Sample]:
        try:
            with self.sessions() as session:
                found = list(self.read(session))
        except (*DATABASE_AWAY, PoolTimeoutError):
            yield self.up, {}, 0.0
            return
        yield self.up, {}, 1.0
        yield from found
