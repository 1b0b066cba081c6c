"""A training run is a trace: a span for each phase, the snapshots that it pinned, links to the votes behind it."""

from types import SimpleNamespace

import pytest

from infra.events import SignalSetAside
from infra.log import outbox
from infra.settings import Settings
from infra.telemetry import tracing
from tests.otlp import Collector
from trainer.config import RunConfig
from trainer.record import RunCancelledError, RunRecord


@pytest.fixture
def collector(tmp_path):
    with Collector() as found:
        tracing.start(Settings(home=tmp_path, otlp_url=found.url), "run")
        yield found
        tracing.stop()


def votes(database, count):
    """Write events of signals, each in a trace of its own; return ids and traces."""
    written = {}
    for number in range(count):
        with tracing.span("vote") as hop, database.begin() as session:
            event = SignalSetAside(feedback_id=f"fb_{number}", episode_id="ep_1", reason="none")
            outbox.append(session, event, key="k", event_id=f"fb_{number}")
            written[f"fb_{number}"] = hop.traceparent.split("-")[1]
    return written


def snapshot(ids):
    return SimpleNamespace(digest="d" * 64, train=[SimpleNamespace(feedback_ids=ids)], gate=[])


def test_phases_are_spans_and_votes_are_links(database, tmp_path, collector):
    written = votes(database, 3)
    record = RunRecord(database, tmp_path / "runs")
    with tracing.span("training run", everloop__recipe="best-of-n"):
        record.create(RunConfig())
        record.phase("snapshot", 1)
        with database.begin() as session:
            record.note_inputs(session, snapshot([*written, "fb_of_before_tracing"]), 7)
        record.phase("train", 2)
        record.finish("held", reason="a test")
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    run = spans["training run"]
    assert set(run.links) == set(written.values())
    assert run.attributes["everloop.dataset_digest"] == "d" * 64
    assert run.attributes["everloop.reward_snapshot_id"] == 7
    assert run.attributes["everloop.run_status"] == "held" and run.attributes["everloop.run_id"] == record.run_id
    for phase in ("training snapshot", "training train"):
        assert spans[phase].parent_id == run.span_id and not spans[phase].is_error
        assert spans[phase].attributes["everloop.run_id"] == record.run_id


def test_a_run_that_is_cancelled_ends_its_phase_with_an_error(database, tmp_path, collector):
    record = RunRecord(database, tmp_path / "runs")
    with pytest.raises(RunCancelledError), tracing.span("training run"):
        record.create(RunConfig())
        record.phase("sample", 10)
        record.update(cancel_requested=True)
        try:
            record.progress(1)
        except RunCancelledError as error:
            with database.begin() as session:
                record.end(session, "cancelled", {"reason": error.message})
            raise
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    assert spans["training sample"].is_error and spans["training run"].is_error


def test_the_newest_hundred_are_linked(database, collector):
    written = votes(database, tracing.MAX_LINKS + 5)
    with database() as session:
        found = outbox.traceparents(session, list(written))
    assert [text.split("-")[1] for text in found] == list(reversed(list(written.values())))[: tracing.MAX_LINKS]
