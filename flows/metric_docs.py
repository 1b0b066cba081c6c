"""Every metric that the code exports, and the table of them in ``docs/monitoring.md``; a test keeps it so."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from infra.telemetry.exposition import FigureCollector

DOCUMENT = Path(__file__).parents[1] / "docs" / "monitoring.md"
BEGIN, END = "<!-- metrics: made by `python -m flows.metric_docs` -->", "<!-- end of the metrics -->"
# Where metrics are told, by the part that tells them.
MODULES: Mapping[str, tuple[str, ...]] = {
    "api": (
        "infra.telemetry.http",
        "agent.metrics",
        "agent.self_evaluation",
        "agent.tools.running",
        "infra.fleet_metrics",
        "infra.log.metrics",
    ),
    "relay": ("infra.log.relay",),
    "ledger, reward": ("infra.log.effects",),
    "ledger": ("deploy.metrics:CanaryCollector", "infra.telemetry.disk"),
    "reconciler": ("deploy.metrics:ReplicaCollector", "deploy.metrics:ATTESTATION_FAILURES"),
    "reward": ("reward.metrics",),
    "flows": ("deploy.metrics:RunCollector",),
}


@dataclass(frozen=True, slots=True)
class Told:
    """A metric as it is exported."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str
    part: str


def all_metrics() -> list[Told]:
    """Return every metric of ours, by part and in the order of the code."""
    return [told for part, names in MODULES.items() for name in names for told in _of(part, name)]


def _of(part: str, name: str) -> Iterator[Told]:
    module_name, _, only = name.partition(":")
    module = importlib.import_module(module_name)
    for attribute, value in vars(module).items():
        if only and attribute != only:
            continue
        if isinstance(value, MetricWrapperBase):
            yield _wrapped(value, part)
        elif isinstance(value, type) and issubclass(value, FigureCollector) and value.__module__ == module_name:
            for figure, (text, *labels) in value.figures.items():
                kind = "counter" if figure.endswith("_total") else "gauge"
                yield Told(figure, kind, tuple(labels), text, part)


def _wrapped(metric: MetricWrapperBase, part: str) -> Told:
    (family,) = metric.describe()
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return Told(name, family.type, tuple(metric._labelnames), family.documentation, part)


def table() -> str:
    """Return the table of the document."""
    lines = ["| metric | type | labels | told by | what it is |", "|---|---|---|---|---|"]
    for told in all_metrics():
        labels = ", ".join(f"`{label}`" for label in told.labels)
        lines.append(f"| `{told.name}` | {told.type} | {labels} | {told.part} | {told.help} |")
    return "\n".join(lines)


def written_anew(document: str) -> str:
    """Return the document with the table as it is now."""
    pattern = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", document)


if __name__ == "__main__":
    DOCUMENT.write_text(written_anew(DOCUMENT.read_text()))
