"""A night whose process is killed in its training, on the running stack."""

import json
import os
import signal
import subprocess
import sys
import uuid

import psutil
import pytest
import sqlalchemy as sa
import yaml

from deploy import runs
from deploy.runs import LOCK, TrainingRun
from deploy.tables import Adapter
from feedback import episodes
from feedback.acceptance import accept
from feedback.episodes import Recording, new_episode_id
from feedback.signals import read_signal
from infra.db import LockLostError, LongLock
from infra.errors import ConflictError, IntegrityError, InvalidRequestError
from tests.conftest import EVERLOOP, close_canary, wait_until
from trainer import prepared
from trainer.checkpoints import CHECKPOINTS_DIR
from trainer.night import Night
from trainer.record import CONFIG_FILE

GIVEN = {"recipe": "dpo", "batch_rows": 2, "micro_batch_rows": 2, "max_row_tokens": 64, "checkpoint_steps": 2}
GIVEN |= {"max_rows": 12, "num_gate_prompts": 8, "max_answer_tokens": 16}
GIVEN |= {"gate_tasks_per_skill": 0, "checkpoints_judged": 2, "judge_prompts": 4}
GIVEN |= {"gate_behaviour_questions": 1, "gate_timed_answers": 2}

NIGHT = """
import json, sys
from infra.db import connect
from infra.settings import load
from trainer.night import Night
settings = load()
Night(connect(settings.need("database_url")), settings, json.loads(sys.argv[1]), 0.5).run()
"""
# The night dies as its third step ends, as the machine would have it: no handler runs.
KILLED = (
    """
import os, signal
from trainer.record import RunRecord
progress = RunRecord.progress
def die(self, done, total=None):
    progress(self, done, total)
    if self.current_phase == "train" and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
RunRecord.progress = die
"""
    + NIGHT
)
TWO_CPUS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_CPU",
    "use_cpu": True,
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "mixed_precision": "no",
}


def teach(stack, count=40):
    """Record answers and corrections of ten teachers (a tenth of all users only judge); the newest train."""
    name = uuid.uuid4().hex[:8]
    with stack.sessions.begin() as session:
        for n in range(count):
            user = f"teacher-{name}-{n % 10}"
            key, learn = episodes.begin(session, user, True)
            asked = [{"role": "user", "content": f"What is {n} plus {uuid.uuid4().hex[:6]}?"}]
            recording = Recording(
                new_episode_id(),
                user,
                "base",
                None,
                None,
                "champion",
                1.0,
                asked,
                {},
                learn,
                f"It is {n}, I believe.",
            )
            recording.status = "complete"
            assert episodes.record(session, recording, key)
            said = {"kind": "correction", "text": f"{n}, I hope.", "idempotency_key": f"fix-{n}"}
            accept(session, read_signal.validate_python({"episode_id": recording.episode_id, "user": user, **said}))


def runs_newest(stack):
    with stack.sessions() as session:
        [run] = runs.newest(session, 1)
        return run.status, run.phase, run.result


def running(stack):
    with stack.sessions() as session:
        return session.scalars(sa.select(TrainingRun).where(TrainingRun.status == "running")).all()


def test_a_night_that_was_killed_goes_on_where_its_last_checkpoint_was(stack):
    teach(stack)
    close_canary(stack)
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(GIVEN)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, (killed.stderr[-2000:], runs_newest(stack))
    [run] = running(stack)
    run_dir = stack.settings.runs_dir / run.id
    assert 'recipe = "dpo"' in (run_dir / CONFIG_FILE).read_text()
    rows = run_dir / prepared.ROWS_FILE
    kept = rows.read_text()
    rows.unlink()  # as the erasure of one of its teachers does
    with stack.sessions() as session, pytest.raises(IntegrityError) as refused:
        prepared.load(session, stack.settings, run)
    assert refused.value.code == "run_not_resumable"
    rows.write_text(kept)
    try:
        result = Night(stack.sessions, stack.settings, {}, 0.5).run()
    finally:
        close_canary(stack)
    assert result["run_id"] == run.id and result["status"] in ("held", "canary"), result
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    [trained] = [line for line in lines if line["phase"] == "trained"]
    assert (trained["resumed_from_step"], trained["steps"]) == (2, 6)
    assert steps(run_dir / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert not rows.exists() and not (run_dir / CHECKPOINTS_DIR).exists() and not running(stack)


@pytest.mark.slow
def test_a_night_in_two_processes_dies_whole_and_goes_on(stack, tmp_path):
    """What `accelerate` starts trains, ends when nobody waits for it any more, and resumes."""
    path = tmp_path / "two-cpus.yaml"
    path.write_text(yaml.safe_dump(TWO_CPUS))
    given = {**GIVEN, "micro_batch_rows": 1, "accelerate_config": str(path), "register_at": "last"}
    teach(stack)
    close_canary(stack)
    night = subprocess.Popen([sys.executable, "-c", NIGHT, json.dumps(given)], start_new_session=True)
    try:
        [run] = wait_until(lambda: running(stack), timeout_s=60)
        metrics = stack.settings.runs_dir / run.id / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and 3 in steps(metrics), timeout_s=240)
        workers = [p for p in psutil.Process(night.pid).children(recursive=True) if "trainer.worker" in p.cmdline()]
        assert len(workers) >= 2
    finally:
        os.kill(night.pid, signal.SIGKILL)
        night.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    try:
        result = Night(stack.sessions, stack.settings, {}, 0.5).run()
    finally:
        close_canary(stack)
    assert result["run_id"] == run.id and result["status"] in ("held", "canary"), result
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    [trained] = [line for line in lines if line["phase"] == "trained"]
    assert trained["resumed_from_step"] >= 2 and steps(metrics) == [1, 2, 3, 4, 5, 6]
    with stack.sessions() as session:
        assert session.get_one(TrainingRun, run.id).release is not None


def steps(metrics):
    """Return the steps that a run's metrics tell a loss of."""
    return [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]


def test_a_dead_night_that_cannot_go_on_has_failed_and_says_why(stack):
    teach(stack, 20)
    close_canary(stack)
    dead = Night(stack.sessions, stack.settings, GIVEN, 0.5)
    dead.record.create(dead.config)
    assert cancelled_when_it_trains(stack, GIVEN) != dead.record.run_id
    with stack.sessions() as session:
        found = session.get_one(TrainingRun, dead.record.run_id)
    assert found.status == "failed" and "no whole checkpoint" in found.result["reason"]


def cancelled_when_it_trains(stack, given):
    """Run a night until it begins to train; return its run."""
    night = Night(stack.sessions, stack.settings, given, 0.5)
    in_phase(night, "train", lambda: cancel(night.record.run_id))
    with pytest.raises(Exception, match="cancelled"):
        night.run()
    return night.record.run_id


def cancel(run_id, **options):
    command = [*EVERLOOP, "train", "--cancel", run_id, "--reason", "enough"]
    return subprocess.run(command, capture_output=True, text=True, **options)


def in_phase(night, name, do):
    """Have something happen when a night has begun a phase."""
    phase = night.record.phase

    def begin(begun, total):
        phase(begun, total)
        if begun == name:
            do()

    night.record.phase = begin


@pytest.mark.parametrize("when", ["train", "gates"])
def test_a_cancelled_night_ends_and_leaves_nothing_registered(stack, when):
    teach(stack, 20)
    close_canary(stack)
    night = Night(stack.sessions, stack.settings, GIVEN, 0.5)
    before = adapters(stack)
    in_phase(night, when, lambda: cancel(night.record.run_id, check=True))
    with pytest.raises(Exception, match="cancelled"):
        night.run()
    with stack.sessions() as session:
        found = session.get_one(TrainingRun, night.record.run_id)
        assert not session.scalars(sa.select(Adapter).where(Adapter.run_id == found.id)).all()
    assert (found.status, found.release) == ("cancelled", None) and adapters(stack) == before
    assert {path.name for path in night.record.run_dir.iterdir() if path.is_dir()} == set()
    again = cancel(night.record.run_id)
    assert again.returncode == 1 and "[run_ended]" in again.stderr


def adapters(stack):
    """Return the directories of registered adapters, half-written ones too."""
    return {path.name for path in stack.settings.adapters_dir.iterdir()}


class Stopped(BaseException):
    """As Prefect raises it in a flow whose process gets a SIGTERM."""


def test_a_night_that_was_stopped_in_its_gates_goes_on_there_without_training_again(stack):
    teach(stack)
    close_canary(stack)
    stopped = Night(stack.sessions, stack.settings, GIVEN, 0.5)

    def stop():
        raise Stopped

    in_phase(stopped, "gates", stop)
    with pytest.raises(Stopped):
        stopped.run()
    [run] = running(stack)
    metrics = stopped.record.run_dir / "metrics.jsonl"
    num_steps = len(steps(metrics))
    again = Night(stack.sessions, stack.settings, {"recipe": "sft"}, 0.5)
    for phase in ("train", "peak"):
        in_phase(again, phase, lambda: pytest.fail("it chooses again"))
    try:
        result = again.run()
    finally:
        close_canary(stack)
    assert result["run_id"] == run.id and result["status"] in ("held", "canary"), result
    assert len(steps(metrics)) == num_steps
    with stack.sessions() as session:
        found = session.get_one(TrainingRun, run.id)
        assert found.resumes == 1 and found.resumed_at > found.started_at
        assert session.scalars(sa.select(Adapter).where(Adapter.run_id == run.id)).one()


def test_while_a_night_runs_another_is_refused_and_touches_nothing(stack):
    with LongLock(stack.sessions, LOCK) as lock:
        assert lock.take()
        night = Night(stack.sessions, stack.settings, GIVEN, 0.5)
        with pytest.raises(ConflictError) as refused:
            night.run()
    assert refused.value.code == "run_in_progress" and not night.record.run_dir.exists()


def test_a_lock_that_went_with_its_connection_is_taken_again_unless_another_has_it(stack):
    def cut():
        with stack.sessions.begin() as session:
            pid = lock._connection.connection.dbapi_connection.info.backend_pid
            session.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    with LongLock(stack.sessions, "a-test") as lock:
        assert lock.take()
        cut()
        lock.keep()
        with LongLock(stack.sessions, "a-test") as other:
            assert not other.take()
            cut()
            wait_until(other.take, timeout_s=10)
            with pytest.raises(LockLostError):
                lock.keep()
        lock.keep()


@pytest.mark.parametrize(
    ("left_with", "said"),
    [
        ({"config": {**GIVEN, "a_key_of_another_version": 1}}, "a_key_of_another_version"),
        ({"resumes": 3}, "4 times"),
    ],
)
def test_a_dead_night_that_must_not_go_on_does_not_stop_the_next(stack, left_with, said):
    teach(stack, 20)
    close_canary(stack)
    dead = Night(stack.sessions, stack.settings, GIVEN, 0.5)
    dead.record.create(dead.config)
    dead.record.update(**left_with)
    left = dead.record.run_dir / CHECKPOINTS_DIR / "checkpoint-2"
    left.mkdir(parents=True)
    assert cancelled_when_it_trains(stack, GIVEN) != dead.record.run_id and not left.exists()
    with stack.sessions() as session:
        found = session.get_one(TrainingRun, dead.record.run_id)
    assert found.status == "failed" and said in found.result["reason"]


def test_a_night_whose_configuration_is_wrong_says_so_in_its_row(stack, monkeypatch, tmp_path):
    from flows.nightly import nightly  # Prefect reads its settings at import

    file = tmp_path / "training.toml"
    file.write_text('recipe = "kto"\nbeta_ = 1\n')
    monkeypatch.setenv("EVERLOOP_TRAINING_CONFIG", str(file))
    with pytest.raises(InvalidRequestError):
        nightly.fn()
    with stack.sessions() as session:
        newest = session.scalars(sa.select(TrainingRun).order_by(TrainingRun.started_at.desc()).limit(1)).one()
    assert (newest.status, newest.recipe) == ("failed", "kto")
    assert "no setting 'beta_'. Did you mean 'beta'?" in newest.result["reason"]
