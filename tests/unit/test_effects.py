"""What a consumer tells of a transaction: its effects once they are committed, nothing of what was rolled back."""

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import REGISTRY

from infra.events import SignalSetAside
from infra.log.effects import Effects
from infra.log.reading import Envelope
from infra.settings import Settings
from infra.telemetry import tracing
from tests.otlp import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LABELS = {"consumer": "test", "type": "signal.set_aside"}


def delivered(**content):
    event = SignalSetAside(feedback_id="fb_1", episode_id="ep_1", reason="r")
    return Envelope("ev_1", SignalSetAside, {**event.to_cloudevent(), **content}), event


def value(name):
    return REGISTRY.get_sample_value(f"everloop_consumer_{name}", LABELS) or 0.0


def test_an_effect_is_counted_when_it_is_committed_with_its_age():
    at = (datetime.now(UTC) - timedelta(seconds=3)).isoformat()
    applied, seconds = value("events_total"), value("event_to_effect_seconds_sum")
    with Effects("test") as effects:
        effects.follow([delivered(time=at), delivered(time=at)])
        assert value("events_total") == applied, "not before"
    assert value("events_total") == applied + 2
    assert 6.0 <= value("event_to_effect_seconds_sum") - seconds < 8.0


def test_what_is_rolled_back_is_not_counted():
    before = value("events_total")
    with pytest.raises(RuntimeError), Effects("test") as effects:
        effects.follow([delivered()])
        raise RuntimeError
    assert value("events_total") == before


@pytest.mark.parametrize("time", ["yesterday", 7, None, "2026-11-27T04:00:00", "9999-12-31T23:59:59+00:00"])
def test_a_time_that_is_none_keeps_nothing_from_its_effect(time):
    before = value("events_total"), value("event_to_effect_seconds_sum")
    with Effects("test") as effects:
        effects.follow([delivered(time=time)])
    assert value("events_total") == before[0] + 1 and value("event_to_effect_seconds_sum") == before[1]


def test_its_span_goes_on_from_the_hop_before_and_what_it_causes_from_its_span(tmp_path):
    with Collector() as collector:
        tracing.start(Settings(home=tmp_path, otlp_url=collector.url), "test")
        pair = delivered(traceparent=PARENT)
        with Effects("test") as effects:
            effects.follow([pair, delivered(traceparent="nonsense"), delivered()])
            caused_in = pair[1].traceparent
        with pytest.raises(RuntimeError), Effects("test") as effects:
            effects.follow([delivered(traceparent=PARENT)])
            raise RuntimeError("what somebody said")
        tracing.stop()
    done, failed = collector.spans
    assert done.parent_id == failed.parent_id == "b7ad6b7169203331"
    assert caused_in.split("-")[2] == done.span_id
    assert not done.is_error and failed.is_error
    assert done.attributes["everloop.feedback_id"] == "fb_1" and done.name == "test signal.set_aside"
