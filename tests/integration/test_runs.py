"""Runs as operators see them: listed, followed by events, cancelled with a reason."""

import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from deploy.runs import LOCK, TrainingRun
from deploy.tables import AuditEntry
from infra.db import LongLock
from infra.events import RunProgressed
from infra.tables import OutboxRow
from trainer.config import RunConfig
from trainer.record import RunCancelledError, RunRecord


@pytest.fixture
def record(stack, tmp_path):
    """A run in its training that nobody works on."""
    found = RunRecord(stack.sessions, tmp_path)
    found.create(RunConfig())
    found.phase("train", 40)
    yield found
    with stack.sessions.begin() as session:
        found.end(session, "failed", {"reason": "only a test"})


def events(stack, run_id):
    query = sa.select(OutboxRow.value).where(OutboxRow.topic == RunProgressed.topic).order_by(OutboxRow.seq)
    with stack.sessions() as session:
        found = [json.loads(value) for value in session.scalars(query)]
    return [
        event["data"]
        for event in found
        if "run.progressed" in event["dataschema"] and event["data"]["run_id"] == run_id
    ]


def test_progress_is_in_the_list_with_the_time_left_and_as_events(stack, record, monkeypatch):
    monkeypatch.setattr("trainer.record.TELL_EVERY_S", 0.0)
    record.progress(0)
    record._first = (0, record._first[1] - 10.0)
    record.progress(10)
    (run,) = [run for run in stack.http.get("/v1/runs").json() if run["id"] == record.run_id]
    assert (run["status"], run["phase"], run["phase_done"], run["phase_total"]) == ("running", "train", 10, 40)
    assert run["seconds_left"] == pytest.approx(30.0, abs=3.0) and not run["cancel_requested"]
    begun, _, further = events(stack, record.run_id)
    assert (begun["phase"], begun["done"], begun["seconds_left"]) == ("train", 0, None)
    assert (further["done"], further["total"], further["seconds_left"]) == (10, 40, pytest.approx(30.0, abs=3.0))
    record.phase("gates", 2)
    assert len(events(stack, record.run_id)) == 4


def test_a_run_that_nobody_works_on_is_told_apart_from_one_that_trains(stack, record):
    def is_stopped():
        return {run["id"]: run["is_stopped"] for run in stack.http.get("/v1/runs").json()}[record.run_id]

    assert is_stopped()
    with LongLock(stack.sessions, LOCK) as lock:
        assert lock.take() and not is_stopped()
    assert is_stopped()
    record.finish("held")
    assert not is_stopped()


def test_a_run_that_goes_on_in_the_middle_tells_the_time_left_by_its_own_pace(stack, record):
    record.progress(30)
    record._first = (30, record._first[1] - 10.0)
    record.progress(35)
    (run,) = [run for run in stack.http.get("/v1/runs").json() if run["id"] == record.run_id]
    assert run["seconds_left"] == pytest.approx(10.0, abs=2.0)


def test_a_phase_that_comes_twice_is_counted_whole(record):
    record.phase("score", 2)
    record._phase_started_s -= 20.0
    record.phase("sample", 2)
    record.phase("score", 2)
    record._phase_started_s -= 30.0
    assert record.finish("held")["seconds"]["score"] == pytest.approx(50.0, abs=1.0)


def test_a_run_is_cancelled_over_http_with_a_reason_that_is_audited(stack, record):
    path = f"/v1/runs/{record.run_id}/cancel"
    assert stack.http.post(path, json={}).status_code == 400
    assert stack.http.post(path, json={"reason": ""}).status_code == 400
    assert not record.is_cancelled()
    answer = stack.http.post(path, json={"reason": "wrong recipe"})
    assert answer.status_code == 202 and answer.json()["cancel_requested"] and record.is_cancelled()
    for goes_on in (lambda: record.progress(11), lambda: record.phase("peak", 4)):
        with pytest.raises(RunCancelledError):
            goes_on()
    with stack.sessions() as session:
        entry = session.scalars(sa.select(AuditEntry).where(AuditEntry.subject == record.run_id)).one()
        assert (entry.action, entry.reason) == ("run_cancelled", "wrong recipe")


def test_who_asks_for_a_night_follows_the_killed_one_that_is_gone_on_with_instead(stack, record):
    from flows.follow import _newest_run  # Prefect reads its settings at import

    asked = datetime.now(UTC)
    assert _newest_run(stack.sessions, asked) is None
    record.update(resumed_at=sa.func.now())
    assert _newest_run(stack.sessions, asked).id == record.run_id


def test_what_cannot_be_cancelled_says_why(stack):
    unknown = stack.http.post("/v1/runs/run_none/cancel", json={"reason": "so"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "run_not_found"
    with stack.sessions.begin() as session:
        session.add(TrainingRun(id="run_over", recipe="dpo", status="held", phase="done", config={}))
    over = stack.http.post("/v1/runs/run_over/cancel", json={"reason": "so"})
    assert over.status_code == 409 and over.json()["error"]["code"] == "run_ended"
