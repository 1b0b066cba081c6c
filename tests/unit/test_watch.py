"""What ends a training, and what is said of it."""

import errno
import json
import subprocess
from types import SimpleNamespace

import pytest

from infra.db import LockLostError
from trainer import loop, training, worker
from trainer.callbacks import MAX_STEPS_WITHOUT_SPREAD, Watch
from trainer.config import RunConfig
from trainer.failures import explained
from trainer.loop import TrainingError
from trainer.prepared import OUTCOME_FILE, outcome
from trainer.recipe import MIN_SPREAD
from trainer.record import RunCancelledError, RunRecord
from trainer.training import Training


@pytest.fixture
def watch(tmp_path):
    return Watch(RunConfig(), tmp_path / "metrics.jsonl", lambda *_: None)


def log(watch, *logs):
    control = SimpleNamespace(should_training_stop=False)
    for step, one in enumerate(logs):
        watch.on_log(None, SimpleNamespace(global_step=step), control, one)
    return control.should_training_stop


def test_rewards_that_hardly_differ_for_some_steps_end_a_run_with_that_reason(watch):
    flat = {"reward_spread": MIN_SPREAD / 2}
    assert not log(watch, *[flat] * (MAX_STEPS_WITHOUT_SPREAD - 1), {"reward_spread": 1.0}, flat)
    watch.raise_if_failed(TrainingError)
    assert log(watch, *[flat] * (MAX_STEPS_WITHOUT_SPREAD - 1))
    with pytest.raises(TrainingError, match="hardly differed") as ended:
        watch.raise_if_failed(TrainingError)
    assert ended.value.code == "no_reward_spread"


def test_steps_without_that_figure_say_nothing_of_it(watch):
    assert not log(watch, *[{"loss": 0.5}] * 9)
    lines = [json.loads(line) for line in watch.metrics_path.read_text().splitlines()]
    assert lines[-1] == {"phase": "train", "step": 8, "loss": 0.5, "spent_s": lines[-1]["spent_s"]}


def state(step):
    return SimpleNamespace(global_step=step, max_steps=9, num_input_tokens_seen=0)


def test_whoever_is_told_of_steps_can_end_the_training(tmp_path):
    told = []

    def on_step(step, steps):
        told.append((step, steps))
        if step == 2:
            raise RunCancelledError("The run was cancelled.")

    watch = Watch(RunConfig(), tmp_path / "metrics.jsonl", on_step)
    control = SimpleNamespace(should_training_stop=False)
    watch.on_train_begin(None, state(0), control)
    watch.on_step_end(None, state(1), control)
    watch.raise_if_failed(TrainingError)
    assert not control.should_training_stop
    watch.on_step_end(None, state(2), control)
    assert control.should_training_stop and told == [(0, 9), (1, 9), (2, 9)]
    with pytest.raises(TrainingError) as ended:
        watch.raise_if_failed(TrainingError)
    assert ended.value.code == "run_cancelled"


def test_what_was_trained_before_a_checkpoint_counts_in_the_time_budget(tmp_path):
    config = RunConfig(max_train_minutes=1.0)
    for spent_s, stopped_by in ((30.0, None), (60.5, "time")):
        watch = Watch(config, tmp_path / "metrics.jsonl", lambda *_: None, spent_s)
        watch.on_step_end(None, state(5), SimpleNamespace(should_training_stop=False))
        assert watch.stopped_by == stopped_by


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "out_of_memory",
        ),
        (TrainingError("Lost.", code="run_cancelled"), "run_cancelled"),
    ],
)
def test_a_failure_says_what_to_do(error, code):
    found = explained(error)
    assert found.code == code and found.message


def test_an_unknown_failure_is_not_explained():
    assert explained(ValueError("secret path")) is None


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), "out_of_memory"), (OSError(errno.ENOSPC, "No space left"), "disk_full")]
)
def test_why_a_worker_of_accelerate_failed_is_left_for_the_night(tmp_path, monkeypatch, error, code):
    def fail(run_id):
        raise error

    (tmp_path / "run_x").mkdir()
    monkeypatch.setattr(worker, "open_run", fail)
    monkeypatch.setattr(worker, "load", lambda: SimpleNamespace(runs_dir=tmp_path))
    monkeypatch.setattr("sys.argv", ["worker", "run_x"])
    worker.main()
    assert json.loads((tmp_path / "run_x" / OUTCOME_FILE).read_text())["code"] == code
    assert outcome(tmp_path / "run_x") is None  # nothing that a run could go on with


def test_a_night_that_waits_for_workers_looks_whether_the_run_is_still_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOOK_EVERY_S", 0.01)
    looks = []

    def make_sure():
        looks.append(1)
        if len(looks) == 3:
            raise LockLostError("Another process holds the lock.")

    record = RunRecord(None, tmp_path, make_sure)
    record.raise_if_cancelled = lambda: None
    waiting = Training(None, None, None, RunConfig(), record, None, None)
    with subprocess.Popen(["sleep", "60"]) as launcher:
        with pytest.raises(LockLostError):
            waiting._wait_for(launcher)
        launcher.kill()
    with subprocess.Popen(["false"]) as launcher:
        assert waiting._wait_for(launcher) == 1


@pytest.mark.parametrize(("rows", "micro", "num_processes"), [(8, 4, 3), (12, 4, 2)])
def test_a_batch_that_cannot_be_dealt_evenly_is_refused(tmp_path, monkeypatch, rows, micro, num_processes):
    monkeypatch.setattr(loop.processes, "num_processes", lambda: num_processes)
    with pytest.raises(TrainingError, match=f"batch_rows = {rows}") as refused:
        loop.arguments(RunConfig(batch_rows=rows, micro_batch_rows=micro), tmp_path)
    assert refused.value.code == "batch_not_divisible"


def test_workers_that_leave_no_word_are_a_failure_that_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(training.sys, "executable", "false")
    record = RunRecord(None, tmp_path)
    record.run_dir.mkdir()
    config = SimpleNamespace(accelerate_file=tmp_path / "own.yaml")
    with pytest.raises(TrainingError, match="ended with status 1") as failed:
        Training(None, None, None, config, record, None, None).launch()
    assert failed.value.code == "worker_failed"
