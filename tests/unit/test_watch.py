"""What ends a training, and what is said of it."""

import errno
import json
from types import SimpleNamespace

import pytest

from trainer.callbacks import MAX_STEPS_WITHOUT_SPREAD, Watch
from trainer.config import RunConfig
from trainer.failures import explained
from trainer.loop import TrainingError
from trainer.recipe import MIN_SPREAD


@pytest.fixture
def watch(tmp_path):
    return Watch(RunConfig(), tmp_path / "metrics.jsonl", lambda *_: None, lambda: False)


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
    assert lines[-1] == {"phase": "train", "step": 8, "loss": 0.5}


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
