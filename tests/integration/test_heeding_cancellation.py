"""A night that looks by itself whether its flow was cancelled, from before its row is there."""

from contextlib import contextmanager

import httpx
import sqlalchemy as sa

from deploy.runs import TrainingRun
from deploy.tables import AuditEntry
from flows import hooks, prefect_view
from tests.conftest import wait_until


def test_it_looks_again_until_there_is_a_run_to_end(database, monkeypatch):
    asked = []

    @contextmanager
    def cancellation(run_id):
        def is_cancelled():
            asked.append(run_id)
            if len(asked) == 1:
                raise httpx.ConnectError("away")
            return len(asked) > 2

        yield is_cancelled

    monkeypatch.setattr(hooks, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(prefect_view, "cancellation", cancellation)

    def requested():
        with database() as session:
            return session.scalars(sa.select(TrainingRun.cancel_requested)).all()

    with hooks.heeding_cancellation(database, "a-flow-run"):
        wait_until(lambda: len(asked) > 4, timeout_s=10)  # it was told so, and found no run
        with database.begin() as session:
            session.add(
                TrainingRun(
                    id="run_1", recipe="sft", status="running", phase="train", config={}, flow_run_id="a-flow-run"
                )
            )
        wait_until(lambda: requested() == [True], timeout_s=10)
    with database() as session:
        told = session.scalars(sa.select(AuditEntry.action).where(AuditEntry.subject == "run_1")).all()
    assert told == ["run_cancelled"]
