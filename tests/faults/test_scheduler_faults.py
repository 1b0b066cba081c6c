"""Nights through the scheduler: two at once, one that is cancelled there; and the rest while it is away."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

import httpx
import psutil
import pytest
import sqlalchemy as sa

from deploy import attest, attestation
from deploy.runs import TrainingRun
from deploy.tables import Adapter, AuditEntry
from infra.errors import IntegrityError
from infra.stack import parts
from reward.tables import RewardUpdate
from tests.conftest import EVERLOOP, close_canary, in_prefect, wait_until
from tests.faults.harness import cli
from tests.faults.test_night import GIVEN, teach
from tests.faults.test_night import adapters as registered

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
    shown = artifacts(stack, one["run"])
    gates = {row["gate"] for row in json.loads(shown["gates"])}
    assert "win_rate" in gates and "| | trains | judges |" in shown["dataset"]
    assert f"/operate/runs/{new}" in shown["run"]


def artifacts(stack, run_id):
    found = ask(stack, "/artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
    return {artifact["key"]: artifact["data"] for artifact in found}


def ask(stack, path, **body):
    return in_prefect(stack.settings).post(path, json=body).json()


def test_a_night_that_is_cancelled_in_prefect_ends_and_leaves_nothing_registered(stack):
    teach(stack, 20)
    close_canary(stack)
    before, known = registered(stack), set(runs(stack))
    flow_run = cli("flows", "run", "nightly", *BY_HAND, "--no-wait")["run"]

    def training():
        return [run for name, run in runs(stack).items() if name not in known and run.phase == "train"]

    [run] = wait_until(training, timeout_s=120, what="the night did not begin to train")
    cli("flows", "cancel", flow_run, report=False)
    wait_until(lambda: runs(stack)[run.id].status != "running", timeout_s=90, what="the night was not ended")
    found = runs(stack)[run.id]
    assert (found.status, found.release) == ("cancelled", None) and registered(stack) == before
    assert {path.name for path in (stack.settings.runs_dir / run.id).iterdir() if path.is_dir()} == set()
    wait_until(lambda: not processes_of(flow_run), timeout_s=90, what="a process was left behind")  # the hook's too
    with stack.sessions() as session:
        told = session.scalars(sa.select(AuditEntry).where(AuditEntry.subject == run.id)).all()
    assert [entry.action for entry in told] == ["run_cancelled"]


def test_a_night_that_no_runner_tells_of_its_cancellation_heeds_it_by_itself(stack):
    teach(stack, 20)
    close_canary(stack)
    before, known = registered(stack), set(runs(stack))
    begun = in_prefect(stack.settings).get("/deployments/name/nightly/everloop").json()
    given = {"by_hand": True, "min_new_signals": 0, "config": GIVEN}
    taken = {"type": "PENDING", "name": "Pending"}  # so no worker takes it up
    flow_run = ask(stack, f"/deployments/{begun['id']}/create_flow_run", parameters=given, state=taken)["id"]
    env = os.environ | parts.prefect_environment(stack.settings) | {"PREFECT__FLOW_RUN_ID": flow_run}
    with subprocess.Popen([sys.executable, "-m", "prefect.engine"], env=env) as alone:
        try:
            [run] = wait_until(
                lambda: [run for name, run in runs(stack).items() if name not in known and run.phase == "train"],
                timeout_s=120,
                what="the night did not begin to train",
            )
            cli("flows", "cancel", flow_run, report=False)
            alone.wait(timeout=90)
        finally:
            alone.kill()
    found = runs(stack)[run.id]
    assert (found.status, found.release) == ("cancelled", None) and registered(stack) == before
    state = in_prefect(stack.settings).get(f"/flow_runs/{flow_run}").json()["state"]
    assert state["type"] == "CANCELLED", state
    with stack.sessions() as session:
        told = session.scalars(sa.select(AuditEntry).where(AuditEntry.subject == run.id)).all()
    assert [entry.action for entry in told] == ["run_cancelled"]


def processes_of(flow_run):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if flow_run in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_what_is_served_is_proved_again_and_what_is_not_proved_raises_an_alarm(stack, monkeypatch):
    ran = cli("flows", "run", "attest")
    assert ran["state"] == "Completed", ran
    proofs = json.loads(artifacts(stack, ran["run"])["proofs"])
    assert {"base"} <= {row["release"] for row in proofs} and not any(row["problem"] for row in proofs)
    probe = attest.probe

    async def of_another_model(engine, model):
        return [logprob - 1.0 for logprob in await probe(engine, model)]

    monkeypatch.setattr(attest, "probe", of_another_model)
    found = [asdict(row) for row in asyncio.run(attestation.prove_again(stack.sessions, stack.settings))]
    with pytest.raises(IntegrityError) as alarm:
        attestation.raise_alarm(stack.sessions, found)
    assert alarm.value.code == "attestation_failed" and "base on http" in alarm.value.message
    with stack.sessions() as session:
        entry = session.scalars(sa.select(AuditEntry).order_by(AuditEntry.id.desc()).limit(1)).one()
    assert (entry.action, entry.actor) == ("attestation_failed", "everloop/attest")
    assert stack.ask().choices, "an alarm takes nothing out of service"


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
