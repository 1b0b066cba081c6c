"""Metrics, alerts and dashboards agree: what one names the other exports, documents or tests."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from flows import metric_docs
from infra.telemetry.exposition import FigureCollector

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
RULES = [
    rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARDS = [json.loads(path.read_text()) for path in sorted(MONITORING.glob("grafana/dashboards/*.json"))]
LABELS = {
    "arm", "consumer", "kind", "method", "outcome", "partition", "reason", "replica", "route", "status", "topic",
    "tool", "type", "vote",
}  # fmt: skip
FOREIGN = {"up", "process_resident_memory_bytes"}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
METRICS = metric_docs.all_metrics()
EXPORTED = {told.name + suffix for told in METRICS for suffix in SUFFIXES[told.type]} | FOREIGN


def panels():
    return [(board["title"], panel) for board in DASHBOARDS for panel in board["panels"]]


def expressions():
    found = [(rule["alert"], rule["expr"]) for rule in RULES]
    return found + [
        (f"{board}: {panel['title']}", target["expr"]) for board, panel in panels() for target in panel["targets"]
    ]


def names_in(expression):
    """Return the names of the metrics in an expression: what stands before a brace, or looks like one of ours."""
    return set(re.findall(r"\b(?:everloop_\w+|process_\w+|up(?=\{))", expression))


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not here; the Debian package `prometheus` has it.")
    return found


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text[:40])
def test_what_an_alert_or_a_dashboard_names_is_exported(where, expression):
    names = names_in(expression)
    assert names, f"{where} names no metric"
    assert names <= EXPORTED, f"{where}: {sorted(names - EXPORTED)} is exported by nothing"


def test_no_metric_of_the_code_is_left_out_of_the_documents_list():
    told = {metric.name for metric in METRICS}
    named = {}
    for folder in ("agent", "deploy", "feedback", "flows", "infra", "reward", "trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r'^\s*(?:\w+ = \w+\()?\s*"(everloop_[a-z_]+)"', path.read_text(), re.MULTILINE):
                named[name] = path
    assert len(named) > 40
    for name, path in named.items():
        assert name in told or f"{name}_total" in told, f"{name} of {path} is missing in flows/metric_docs.py"


def test_the_table_in_the_documents_is_made_from_the_code():
    document = metric_docs.DOCUMENT.read_text()
    assert document == metric_docs.written_anew(document), "run `python -m flows.metric_docs`"
    assert metric_docs.table() in document


def test_names_are_unique_and_labels_bounded():
    names = [told.name for told in METRICS]
    assert len(set(names)) == len(names)
    assert {label for told in METRICS for label in told.labels} <= LABELS
    assert all(told.name.startswith("everloop_") and told.help.endswith(".") for told in METRICS)


def test_every_alert_has_its_line_in_the_runbook_and_a_test_in_which_it_fires():
    document = metric_docs.DOCUMENT.read_text()
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for t in tests for case in t["alert_rule_test"] if case.get("exp_alerts")}
    quiet = {case["alertname"] for t in tests for case in t["alert_rule_test"] if not case.get("exp_alerts")}
    alerts = {rule["alert"] for rule in RULES}
    assert fired == alerts and quiet == alerts
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{rule['alert'].lower()}"
        assert f"\n### {rule['alert']}\n" in document
    assert set(re.findall(r"^### (Everloop\w+)$", document, re.MULTILINE)) == alerts


def test_dashboards_can_be_provisioned():
    datasource = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (uid,) = [source["uid"] for source in datasource["datasources"]]
    assert len({board["uid"] for board in DASHBOARDS}) == len(DASHBOARDS) == 2
    for board in DASHBOARDS:
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        assert all(target["datasource"]["uid"] == uid for p in board["panels"] for target in p["targets"])
        taken = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells


def test_the_rules_fire_when_they_should(promtool):
    done = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid(promtool):
    done = subprocess.run(
        [promtool, "check", "config", "prometheus.yml"], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_expression_of_the_dashboards_is_one(promtool, tmp_path):
    rules = [{"record": f"panel:{n}:x", "expr": expression} for n, (_, expression) in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", tmp_path / "panels.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Everything(FigureCollector):
    """All figures of ours, with a value each."""

    figures: ClassVar = {told.name: (told.help, *told.labels) for told in METRICS if told.type != "histogram"}

    def samples(self):
        for name, (_, *labels) in self.figures.items():
            yield name, dict.fromkeys(labels, "x"), 1.0


def test_names_follow_the_conventions_of_prometheus(promtool):
    registry = CollectorRegistry()
    registry.register(Everything())
    done = subprocess.run([promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
