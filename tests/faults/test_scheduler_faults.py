"""Nights through the scheduler: two at once, one that is cancelled there; and the rest while it is away."""

import json
import os
import signal
import subprocess

import httpx
import psutil
import sqlalchemy as sa

from deploy.runs import TrainingRun
from deploy.tables import Adapter, AuditEntry
from reward.tables import RewardUpdate
from tests.conftest import EVERLOOP, wait_until
from tests.faults.harness import cli
from tests.faults.test_night import GIVEN, adapters, close_canary, teach

BY_HAND = ["--param", "by_hand=true", "--param", "min_new_signals=0", "--param", f"config={json.dumps(GIVEN)}"]


def runs(stack):
    with stack.sessions() as session:
        return {run.id: run for run in session.scalars(sa.select(TrainingRun))}


def test_of_two_nights_started_at_the_same_moment_one_trains(stack):
    teach(stack)
    close_canary(stack)
    before = set(runs(stack))
    command = [*EVERLOOP, "flows", "run", "nightly", *BY_HAND, "--json", "-"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [json.loads(process.communicate(timeout=300)[0]) for process in started]
    close_canary(stack)
    [one] = [run for run in ended if run["state"] == "Completed"]
    [other] = [run for run in ended if run["state"] != "Completed"]
    assert other["state"] == "Failed" and "Another training run is in progress" in other["message"]
    [new] = set(runs(stack)) - before
    found = runs(stack)[new]
    assert found.flow_run_id == one["run"] and found.status in ("held", "canary"), found.result
    with stack.sessions() as session:
        assert len(session.scalars(sa.select(Adapter).where(Adapter.run_id == new)).all()) == 1
    shown = {
        a["key"]: a for a in ask(stack, "/artifacts/filter", artifacts={"flow_run_id": {"any_": [one["run"]]}})
    }
    gates = {row["gate"] for row in json.loads(shown["gates"]["data"])}
    assert "win_rate" in gates and "| | trains | judges |" in shown["dataset"]["data"]
    assert f"/operate/runs/{new}" in shown["run"]["data"]


def ask(stack, path, **body):
    return httpx.post(f"{stack.settings.prefect_url}{path}", json=body, trust_env=False).json()


def test_a_night_that_is_cancelled_in_prefect_ends_and_leaves_nothing_registered(stack):
    teach(stack, 20)
    close_canary(stack)
    before, known = adapters(stack), set(runs(stack))
    flow_run = cli("flows", "run", "nightly", *BY_HAND, "--no-wait")["run"]

    def training():
        return [run for name, run in runs(stack).items() if name not in known and run.phase == "train"]

    [run] = wait_until(training, timeout_s=120, what="the night did not begin to train")
    cli("flows", "cancel", flow_run, report=False)
    wait_until(lambda: runs(stack)[run.id].status != "running", timeout_s=90, what="the night was not ended")
    found = runs(stack)[run.id]
    assert (found.status, found.release) == ("cancelled", None) and adapters(stack) == before
    assert {path.name for path in (stack.settings.runs_dir / run.id).iterdir() if path.is_dir()} == set()
    assert not [p for p in psutil.process_iter() if flow_run in env_of(p) and p.status() != psutil.STATUS_ZOMBIE]
    with stack.sessions() as session:
        told = session.scalars(sa.select(AuditEntry).where(AuditEntry.subject == run.id)).all()
    assert [entry.action for entry in told] == ["run_cancelled"]


def env_of(process):
    try:
        return process.environ().values()
    except psutil.Error:
        return ()


def test_without_prefect_people_chat_and_vote_and_the_reward_model_learns(stack):
    for part in ("flows", "prefect"):
        os.kill(stack.part_pid(part), signal.SIGKILL)
        stack.supervisor.stop(part)
    try:
        done = subprocess.run([*EVERLOOP, "flows", "list"], capture_output=True, text=True)
        assert done.returncode == 1 and "[prefect_unavailable]" in done.stderr
        episode = stack.ask("Name a metal.")
        receipt = stack.feedback(episode.id, kind="thumb", value=1)
        assert receipt.status_code == 202
        with stack.sessions() as session:
            of_it = sa.select(RewardUpdate.seq).where(RewardUpdate.feedback_id == receipt.json()["id"])
            wait_until(lambda: session.scalar(of_it) is not None, timeout_s=30)
        assert stack.http.get("/operate").status_code == 200
    finally:
        stack.supervisor.start("prefect", "flows")
    wait_until(lambda: deployed(stack), timeout_s=120)


def deployed(stack):
    try:
        return ask(stack, "/deployments/count") == 6
    except (httpx.HTTPError, ValueError):
        return False
