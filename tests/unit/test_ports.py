"""Ports of metrics: free ones of ours, or five in a row, and where Prometheus finds them."""

import json
import socket

import pytest

from infra.errors import SetupError
from infra.settings import Settings
from infra.stack import ports
from infra.stack.parts import WITH_METRICS, Part

PARTS = [Part(name, ["true"]) for name in ("postgres", "engine", *WITH_METRICS)]


def given(parts):
    return {part.name: int(part.environment.get("EVERLOOP_METRICS_PORT", 0)) for part in parts}


def test_unless_one_is_set_free_ports_of_ours_are_taken_but_none_that_was_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(ports, "OWN_PORTS", range(30_000, 30_009))
    monkeypatch.setattr(ports, "PORT_TRIES", 9)
    settings = Settings(home=tmp_path, api_port=30_000, database_url="postgresql+psycopg://u@h:30001/x")
    found = given(ports.with_metrics_ports(settings, PARTS))
    chosen = [found[name] for name in WITH_METRICS]
    assert len(set(chosen)) == len(WITH_METRICS) and set(chosen) <= set(range(30_002, 30_009))
    assert found["postgres"] == 0


def test_from_the_one_that_is_set_they_are_in_a_row(tmp_path):
    found = given(ports.with_metrics_ports(Settings(home=tmp_path, metrics_port=29_100), PARTS))
    assert [found[name] for name in WITH_METRICS] == list(range(29_100, 29_106))


def test_one_of_them_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError) as refused:
            ports.with_metrics_ports(Settings(home=tmp_path, metrics_port=port), PARTS)
    assert refused.value.code == "port_taken" and "EVERLOOP_METRICS_PORT" in refused.value.message


def test_prometheus_is_told_every_part_that_is_started(tmp_path):
    settings = Settings(home=tmp_path, metrics_port=29_100, engine_url="http://127.0.0.1:29000")
    (tmp_path / "run").mkdir()
    parts = ports.with_metrics_ports(settings, PARTS)
    ports.write_targets(settings, parts)
    told = {t["labels"]["part"]: t["targets"] for t in json.loads(settings.metrics_targets_file.read_text())}
    assert told["engine"] == ["127.0.0.1:29000"] and told["flows"] == ["127.0.0.1:29105"]
    assert told.keys() == {"engine", *WITH_METRICS}
    ports.write_targets(settings, [part for part in parts if part.name != "engine"])
    assert "engine" not in settings.metrics_targets_file.read_text(), "of one elsewhere nothing is known"
