"""Flows through a real Prefect server and worker: started by hand, what they show, and how they end."""

import json
import os
import subprocess
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import sqlalchemy as sa

from deploy.runs import TrainingRun
from feedback import episodes, erasure
from feedback.tables import Erasure
from flows.bench.stack import ADDRESSES, own_stack
from flows.housekeeping import LOCK
from infra.db import LongLock
from infra.errors import SetupError
from infra.tables import ConsumedEvent, ConsumerRow, OutboxRow
from tests.conftest import EVERLOOP, in_prefect, wait_until
from tests.faults.harness import cli, cli_fails

PARTS = {"postgres", "broker", "relay", "ledger", "prefect", "flows"}


@pytest.fixture(scope="module")
def scheduler(home):
    """A stack without engine and API; its settings, its database and its supervisor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLOOP_HOME", str(home))
        for name in ADDRESSES:
            patch.delenv(f"EVERLOOP_{name}", raising=False)
        with own_stack(PARTS) as (settings, sessions, supervisor):
            wait_until(lambda: deployed(settings) == 6, timeout_s=90, what="the flows were not deployed")
            yield settings, sessions, supervisor


def ask(settings, path, **body):
    return in_prefect(settings).post(path, json=body).json()


def deployed(settings):
    try:
        return ask(settings, "/deployments/count")
    except (httpx.HTTPError, ValueError):
        return 0


def artifacts(settings, run_id):
    found = ask(settings, "/artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
    return {artifact["key"]: artifact["data"] for artifact in found}


def test_every_flow_is_listed_with_its_schedule(scheduler):
    rows = {row["name"]: row for row in cli("flows", "list")["flows"]}
    assert set(rows) == {"nightly", "watch-canary", "reward-backbone", "retention", "erasure", "attest"}
    assert rows["nightly"]["cron"] == scheduler[0].night_cron and rows["nightly"]["pool"] == "everloop"


def test_a_run_deletes_what_is_past_its_time_and_shows_it_and_copies_no_source(scheduler):
    settings, sessions, _ = scheduler
    with sessions.begin() as session:
        for _ in range(3):
            event_id = f"ev_{uuid.uuid4().hex}"
            row = {"event_id": event_id, "topic": "everloop.test", "key": "k", "value": b"{}"}
            session.add(OutboxRow(**row, created_at="2001-01-01T00:00:00Z", published_at="2001-01-01T00:00:00Z"))
    ran = cli("flows", "run", "retention")
    assert ran["state"] == "Completed"
    shown = json.loads(artifacts(settings, ran["run"])["retention"])
    assert {row["what"]: row["number"] for row in shown}["events"] in (0, 3)  # the ledger may have been sooner
    with sessions() as session:
        assert not session.scalars(sa.select(OutboxRow).where(OutboxRow.topic == "everloop.test")).all()
    assert not {"flows", "trainer", "pyproject.toml", "infra"} & {path.name for path in settings.home.iterdir()}


def test_an_erasure_that_a_room_gave_up_is_finished(scheduler):
    """Its event is a dead letter of the ledger; the flow sends it again, and finishes what rooms are running."""
    settings, sessions, supervisor = scheduler
    name = f"ada-{uuid.uuid4().hex[:8]}"
    with sessions.begin() as session:
        episodes.begin(session, name, True)
    supervisor.stop("ledger")
    with sessions.begin() as session:
        erasure_id = erasure.forget(session, name, "retrain-required")
        # As the ledger leaves it that gave it up, and as the reward worker (not part of this stack) reports.
        session.add(ConsumedEvent(consumer="erasure", event_id=erasure_id, dead_letter=True))
        erasure.report(session, erasure_id, "reward", {"sites_removed": 0})
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        session.execute(sa.update(Erasure).where(Erasure.id == erasure_id).values(requested_at=long_ago))
        assert session.scalar(sa.select(sa.exists().where(ConsumerRow.name == "erasure")))
    supervisor.start("ledger")
    ran = cli("flows", "run", "erasure")
    assert ran["state"] == "Completed", ran
    with sessions() as session:
        assert erasure.get(session, erasure_id)["complete"]
    [row] = json.loads(artifacts(settings, ran["run"])["erasures"])
    assert row["erasure_id"] == erasure_id and row["pending"] == []
    again = cli("flows", "run", "erasure")
    assert again["state"] == "Completed" and "erasures" not in artifacts(settings, again["run"])


def test_a_night_in_quiet_hours_waits_for_their_end_once_or_is_skipped_with_a_reason(scheduler):
    settings, sessions, _ = scheduler
    now = datetime.now(UTC)
    begin, end = now - timedelta(hours=1), now + timedelta(hours=1)
    quiet = f"{begin:%H:%M}-{end:%H:%M}"

    def waiting():
        states = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        found = ask(settings, "/flow_runs/filter", flow_runs=states, flows={"name": {"any_": ["nightly"]}})
        return [run for run in found if run["next_scheduled_start_time"][:16] == f"{end:%Y-%m-%dT%H:%M}"]

    (settings.home / "everloop.toml").write_text(f'quiet_hours = ["{quiet}"]\n')
    try:
        for _ in range(2):
            assert cli("flows", "run", "nightly", "--param", "min_new_signals=7")["state"] == "Completed"
        [run] = waiting()
        assert run["parameters"]["min_new_signals"] == 7
        (settings.home / "everloop.toml").write_text(f'quiet_hours = ["{quiet}"]\nquiet_hours_then = "skip"\n')
        ran = cli("flows", "run", "nightly")
    finally:
        (settings.home / "everloop.toml").unlink()
    with sessions() as session:
        [row] = session.scalars(sa.select(TrainingRun))
    assert (row.status, row.result["code"], row.flow_run_id) == ("skipped", "quiet_hours", ran["run"])
    assert f"/operate/runs/{row.id}" in artifacts(settings, ran["run"])["run"]


def test_what_is_wrong_is_not_tried_again_and_a_refusal_says_why(scheduler):
    settings, _, _ = scheduler
    done = subprocess.run(
        [*EVERLOOP, "flows", "run", "nightly", "--param", 'config={"recipe": "none"}', "--json", "-"],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    ran = json.loads(done.stdout)
    assert done.returncode == 1 and ran["state"] == "Failed" and "There is no recipe 'none'" in ran["message"]
    tasks = ask(settings, "/task_runs/filter", flow_runs={"id": {"any_": [ran["run"]]}})
    assert all(task["run_count"] <= 1 for task in tasks)
    assert "[flow_not_found]" in cli_fails("flows", "run", "no-such-flow")
    assert "[parameter_invalid]" in cli_fails("flows", "run", "nightly", "--param", "seven")
    assert "[flow_parameters_invalid]" in cli_fails("flows", "run", "nightly", "--param", "canary_share=often")


def test_a_part_that_is_away_is_tried_again_and_a_run_can_be_cancelled_meanwhile(scheduler):
    """There is no engine here: `attest` waits for one."""
    settings, _, _ = scheduler
    run_id = cli("flows", "run", "attest", "--no-wait")["run"]

    def waits():
        tasks = ask(settings, "/task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
        return any(task["state_name"] == "AwaitingRetry" for task in tasks)

    wait_until(waits, timeout_s=60, what="it was not tried again")
    cli("flows", "cancel", run_id, report=False)
    wait_until(lambda: state(settings, run_id) == "CANCELLED", timeout_s=90)  # it kills after 30
    assert "[run_ended]" in cli_fails("flows", "cancel", run_id)


def test_nights_go_to_a_pool_of_the_type_and_template_of_the_settings(scheduler, tmp_path):
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from flows import worker

    settings, _, _ = scheduler
    template = tmp_path / "template.json"
    variables = {"properties": {"namespace": {"type": "string", "default": "nights"}}}
    job = {"namespace": "{{ namespace }}"}
    template.write_text(json.dumps({"job_configuration": job, "variables": variables}))
    elsewhere = {"night_pool": "cluster", "pool_type": "kubernetes", "pool_template": template}
    ours = {PREFECT_API_URL: settings.need("prefect_url"), PREFECT_API_AUTH_STRING: settings.prefect_auth}
    with temporary_settings(ours):
        try:
            worker.register(settings.model_copy(update=elsewhere))
            pool = in_prefect(settings).get("/work_pools/cluster").json()
            assert pool["type"] == "kubernetes" and "namespace" in pool["base_job_template"]["job_configuration"]
            pools = {row["name"]: row["pool"] for row in cli("flows", "list")["flows"]}
            assert pools == dict.fromkeys(pools, "everloop") | {"nightly": "cluster"}
            for broken in ("{", "[]", json.dumps({"job_configuration": job})):
                template.write_text(broken)
                with pytest.raises(SetupError, match="get-default-base-job-template"):
                    worker.register(settings.model_copy(update={**elsewhere, "night_pool": "another"}))
        finally:
            worker.register(settings)
    assert {row["pool"] for row in cli("flows", "list")["flows"]} == {"everloop"}


def test_runs_whose_process_died_with_the_worker_are_told_as_crashed_when_it_comes_back(scheduler):
    settings, sessions, supervisor = scheduler
    with LongLock(sessions, LOCK) as lock:  # the run waits for it, and so is in the middle of its work
        wait_until(lock.take, timeout_s=30)
        run_id = cli("flows", "run", "retention", "--no-wait")["run"]
        wait_until(lambda: state(settings, run_id) == "RUNNING", timeout_s=60)
        second = cli("flows", "run", "retention", "--no-wait")["run"]
        wait_until(lambda: state(settings, second) == "CANCELLED", timeout_s=60, what="two ran at once")
        kill_flows(settings, supervisor)
        wait_until(lambda: state(settings, run_id) == "CRASHED", timeout_s=90)
    assert cli("flows", "run", "retention")["state"] == "Completed"


def state(settings, run_id):
    return in_prefect(settings).get(f"/flow_runs/{run_id}").json()["state"]["type"]


def kill_flows(settings, supervisor):
    """Kill the worker and the runs that it started, as a machine that fails does."""
    import psutil

    pid = next(part.pid for part in supervisor.status() if part.name == "flows")
    worker = psutil.Process(pid)
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()
