"""The training loop with the real model: every recipe, budgets, cancellation, and a process that is killed."""

import json
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.runs import METRICS_FILE
from tests.unit.test_training_data import example
from trainer import checkpoints, loop
from trainer.checkpoints import CHECKPOINTS_DIR
from trainer.config import RunConfig
from trainer.failures import explained
from trainer.fit import fitting
from trainer.loop import TrainingError
from trainer.pairs import pair_of
from trainer.recipe import Material, Rows, resolve
from trainer.record import RunCancelledError
from trainer.rollout import Sample
from trainer.snapshot import Snapshot

ENGINE_PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
SMALL = {"batch_rows": 2, "micro_batch_rows": 2, "max_row_tokens": 48, "checkpoint_steps": 2, "lora_rank": 4}


def prepared(name="dpo", num_rows=12, **more):
    recipe, config = resolve({"recipe": name, **SMALL, **more})
    examples = []
    for n in range(num_rows):
        # The prompts differ, so that rows do; every second answer was liked.
        examples.append(
            example(f"The answer {n} is long and says little.", [float(n % 2)], [f"It is {n}."], f"What is {n}?")
        )
    material = Material(
        Snapshot(train=examples),
        lambda prompts, num_samples: [[Sample("", "stop")] * num_samples for _ in prompts],
        lambda prompts, answers, references: [[0.0] * len(group) for group in answers],
        lambda num_tasks: [],
        lambda tasks, answers: [],
        (0, 100),
    )
    rows = recipe.rows(material, config)
    return recipe, config, rows.newest(num_rows).rows, material


def train(model_dir, run_dir, name="dpo", num_rows=12, start_from=None, settings=None, **more):
    run_dir.mkdir(exist_ok=True)
    recipe, config, rows, material = prepared(name, num_rows, **(settings or {}))
    return loop.train(
        recipe, config, rows, material=material, model_dir=model_dir, start_from=start_from, run_dir=run_dir, **more
    )


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(trained):
    return load_file(trained.adapter_dir / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(base_model_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return train(base_model_dir, run_dir), run_dir


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("dpo", 8), ("kto", 8), ("sft", 8), ("online-dpo", 8), ("self-distill", 4)],  # of each row it samples two
)
def test_every_recipe_trains_an_adapter_that_plain_peft_loads(base_model_dir, tmp_path, name, num_rows):
    settings = {"max_answer_tokens": 12, "epochs": 1}
    trained = train(base_model_dir, tmp_path, name, num_rows=num_rows, settings=settings)
    assert trained.num_steps == 4 and trained.stopped_by is None
    model = AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        before = model(ids).logits
        carrying = PeftModel.from_pretrained(model, str(trained.adapter_dir))
        assert (carrying(ids).logits - before).abs().max() > 0
    assert len(losses(tmp_path)) == 4


def test_metrics_go_to_mlflow_where_it_is_installed(base_model_dir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra of its own: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    train(base_model_dir, tmp_path / "run_told", num_rows=8, settings={"report_to": ["mlflow"]})
    (told,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert told.info.run_name == "run_told" and told.data.metrics["loss"] == losses(tmp_path / "run_told")[4]


def test_metrics_go_to_trackio_where_it_is_installed(base_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is an extra of its own: pip install trackio")
    train(base_model_dir, tmp_path / "run_told", num_rows=8, settings={"report_to": ["trackio"]})
    (told,) = trackio.Api().runs("everloop")
    logged = trackio.sqlite_storage.SQLiteStorage.get_logs("everloop", told.name)
    assert told.name == "run_told"
    assert losses(tmp_path / "run_told")[4] in [line.get("train/loss") for line in logged], logged


def test_a_run_goes_on_from_the_champions_adapter(base_model_dir, tmp_path, undisturbed):
    champion, _ = undisturbed
    settings = {"learning_rate": 1e-12}
    trained = train(base_model_dir, tmp_path, num_rows=8, start_from=champion.adapter_dir, settings=settings)
    for name, weight in weights(trained).items():
        torch.testing.assert_close(weight, weights(champion)[name], atol=1e-6, rtol=0)


def _train_until_killed(model_dir, run_dir, at_step):
    def die(step, _):
        if step == at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(model_dir, run_dir, on_step=die)


@pytest.mark.parametrize("at_step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(base_model_dir, tmp_path, undisturbed, at_step):
    whole, whole_dir = undisturbed
    process = multiprocessing.get_context("spawn").Process(
        target=_train_until_killed, args=(base_model_dir, tmp_path, at_step)
    )
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    trained = train(base_model_dir, tmp_path)
    assert trained.resumed_from_step == at_step - 1 and trained.num_steps == whole.num_steps == 6
    assert losses(tmp_path) == losses(whole_dir)
    for name, weight in weights(trained).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_run_that_died_after_its_last_step_takes_no_other(base_model_dir, tmp_path):
    settings = {"epochs": 0.75}  # in mid-epoch transformers would go on with it
    whole = weights(train(base_model_dir, tmp_path, settings=settings))
    again = train(base_model_dir, tmp_path, settings=settings)
    assert (again.resumed_from_step, again.num_steps) == (5, 5) and sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(again).items())


def cancel_at(last):
    def on_step(step, _):
        if step >= last:
            raise RunCancelledError("The run was cancelled.")

    return on_step


def test_a_damaged_checkpoint_is_left_out_for_the_one_before_it(base_model_dir, tmp_path, undisturbed):
    with pytest.raises(TrainingError):
        train(base_model_dir, tmp_path, on_step=cancel_at(6))
    found = sorted((tmp_path / CHECKPOINTS_DIR).glob("checkpoint-*"))
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    adapter = found[-1] / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-9])
    assert checkpoints.newest(tmp_path / CHECKPOINTS_DIR) == found[0]
    trained = train(base_model_dir, tmp_path)
    assert trained.resumed_from_step == 4 and losses(tmp_path) == losses(undisturbed[1])


def test_a_checkpoint_that_was_not_sealed_is_none(tmp_path):
    directory = tmp_path / "checkpoint-2"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) is None and not directory.exists()


def test_a_cancelled_run_leaves_no_adapter(base_model_dir, tmp_path):
    with pytest.raises(TrainingError) as ended:
        train(base_model_dir, tmp_path, on_step=cancel_at(1))
    assert ended.value.code == "run_cancelled" and not (tmp_path / "adapter").exists()
    assert len(losses(tmp_path)) <= 1


@pytest.mark.parametrize(
    ("settings", "stopped_by"), [({"max_train_minutes": 1e-9}, "time"), ({"max_train_tokens": 60}, "tokens")]
)
def test_a_budget_ends_the_training_with_what_it_has_learned(base_model_dir, tmp_path, settings, stopped_by):
    trained = train(base_model_dir, tmp_path, settings=settings)
    assert trained.stopped_by == stopped_by and trained.num_steps < 6
    assert weights(trained)


@pytest.mark.parametrize(
    ("settings", "code"), [({"max_memory_gib": 0.1}, "out_of_memory"), ({"learning_rate": 1e30}, "loss_not_finite")]
)
def test_what_makes_a_training_worthless_is_said(base_model_dir, tmp_path, settings, code):
    with pytest.raises(TrainingError) as ended:
        train(base_model_dir, tmp_path, settings=settings)
    assert ended.value.code == code and not (tmp_path / "adapter").exists()


def test_rows_whose_prompts_leave_no_room_are_counted_and_left_out(base_model_dir):
    found = Rows()
    for length in (1, 30, 200, 5_000):
        found.add("samples", pair_of([{"role": "user", "content": "why " * length}], "So.", "No."))
    settings = SimpleNamespace(base_model_dir=base_model_dir, max_model_tokens=2048)
    kept = fitting(found, settings, RunConfig(max_row_tokens=144))
    assert [len(row["prompt"][0]["content"].split()) for row in kept.rows] == [1, 30]
    assert kept.sources == ["samples"] * 2 and kept.set_aside == {"prompt_too_long": 2}
    settings.max_model_tokens = 140  # the engine holds an answer of 96 besides
    assert fitting(found, settings, RunConfig(max_row_tokens=144)).set_aside == {"prompt_too_long": 3}


def test_what_a_teacher_would_read_half_of_is_counted_and_left_out(base_model_dir):
    found = Rows()
    for length in (1, 100, 200):
        found.add(
            "corrections", {"prompt": [{"role": "user", "content": "Why?"}], "privileged_context": "so " * length}
        )
    settings = SimpleNamespace(base_model_dir=base_model_dir, max_model_tokens=2048)
    kept = fitting(found, settings, RunConfig(max_row_tokens=144))
    assert len(kept.rows) == 2 and kept.set_aside == {"context_too_long": 1}


# Everloop's plug-in is left out; of vLLM, only what its own manual shows is used.
PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model=model, enable_lora=True, max_lora_rank=16, max_model_len=256, enforce_eager=True, dtype="bfloat16")
found = []
for lora in (None, LoRARequest("adapter", 1, adapter)):
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [out] = llm.generate({"prompt_token_ids": ids}, sampling, lora_request=lora)
    found.append([row[i].logprob for row, i in zip(out.prompt_logprobs[1:], ids[1:])])
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_plain_vllm_serves_the_adapter_as_plain_peft_does(base_model_dir, undisturbed):
    trained, _ = undisturbed
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    ids = tokenizer("What is 3? It is 3. The answer 3 is long and says little.")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.bfloat16)

    def logprobs(model):
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
        return rows[torch.arange(len(ids) - 1), ids[1:]].tolist()

    expected = [logprobs(model), logprobs(PeftModel.from_pretrained(model, str(trained.adapter_dir)))]
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [ENGINE_PYTHON, "-c", PLAIN_VLLM, base_model_dir, trained.adapter_dir, json.dumps(ids)]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-2000:]]
    found = json.loads(line.removeprefix("FOUND "))
    apart = float(np.mean(np.abs(np.subtract(*expected))))
    for ours, theirs in zip(expected, found, strict=True):
        # Both are rounded to bfloat16 on the way, in different orders.
        assert np.mean(np.abs(np.subtract(ours, theirs))) < 0.1 * apart


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB, smaller than a checkpoint."""
    directory = tmp_path / "small"
    directory.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", directory], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("mounting a small file system takes root")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_is_a_failure_that_says_so_and_leaves_no_adapter(base_model_dir, small_disk):
    with pytest.raises(Exception) as failed:
        train(base_model_dir, small_disk / "run", settings={"lora_rank": 16, "checkpoint_steps": 1})
    assert explained(failed.value).code == "disk_full"
    assert not (small_disk / "run" / "adapter").exists()
    assert checkpoints.newest(small_disk / "run" / CHECKPOINTS_DIR) is None
