"""The same run on more than one process, and on a mixture of experts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from deploy.runs import METRICS_FILE
from tests.integration import two_processes
from trainer import callbacks
from trainer.checkpoints import CHECKPOINTS_DIR, is_whole

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "infra" / "accelerate").glob("*.yaml"))
TWO_CPUS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "use_cpu": True,
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def saved(model_class, config, base_model_dir, directory):
    """Save a small, randomly initialised model with the default tokenizer; return where."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    config.vocab_size = len(tokenizer)
    model_class(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_model_dir(base_model_dir, tmp_path_factory):
    config = LlamaConfig(**SMALL, intermediate_size=64, tie_word_embeddings=True)
    return saved(LlamaForCausalLM, config, base_model_dir, tmp_path_factory.mktemp("tiny"))


def launch(tiny_model_dir, run_dir, *more):
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(TWO_CPUS))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--module", "tests.integration.two_processes", str(tiny_model_dir), str(run_dir), *more),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def losses_of(run_dir):
    lines = map(json.loads, (run_dir / METRICS_FILE).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_two_sharded_processes_train_the_same_adapter_as_one(tiny_model_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = two_processes.train(tiny_model_dir, one, 4)
    done = launch(tiny_model_dir, two)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = load_file(alone.adapter_dir / "adapter_model.safetensors")
    theirs = load_file(two / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=0)
    assert any(weight.abs().max() > 1e-4 for name, weight in ours.items() if "lora_B" in name)
    losses = [losses_of(run) for run in (one, two)]
    assert len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert [path.name for path in sorted((two / "kept").iterdir())] == ["step-2", "step-3"]
    sealed = sorted((two / CHECKPOINTS_DIR).glob("checkpoint-*"))
    assert len(sealed) == 2 and all(map(is_whole, sealed))
    kept = load_file(two / "kept" / "step-3" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_sharded_run_that_was_killed_goes_on_as_if_nothing_had_happened(tiny_model_dir, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = launch(tiny_model_dir, undisturbed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert launch(tiny_model_dir, killed, "die").returncode != 0
    assert not (killed / "adapter").exists()
    resumed = launch(tiny_model_dir, killed)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses_of(killed) == losses_of(undisturbed)  # begun anew there would be the first two twice
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (undisturbed, killed))
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


@pytest.mark.slow
def test_what_the_main_process_is_told_ends_all_of_them(tiny_model_dir, tmp_path):
    done = launch(tiny_model_dir, tmp_path / "cancelled", "cancel")
    assert done.returncode != 0 and "The run was cancelled." in done.stderr
    assert not (tmp_path / "cancelled" / "adapter").exists()


def test_attention_and_experts_of_a_mixture_are_trained_saved_and_reloaded(base_model_dir, tmp_path, monkeypatch):
    config = Qwen3MoeConfig(
        **SMALL, head_dim=16, intermediate_size=64, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    model_dir = saved(Qwen3MoeForCausalLM, config, base_model_dir, tmp_path / "moe")
    ids = torch.arange(1, 25).reshape(2, 12)
    said = []
    save = callbacks.Adapter.save

    def look_and_save(self, directory):
        with torch.inference_mode():
            said.append(self._trainer.model.eval()(ids).logits)
        save(self, directory)

    monkeypatch.setattr(callbacks.Adapter, "save", look_and_save)
    trained = two_processes.train(model_dir, tmp_path / "run", 4)
    weights = load_file(trained.adapter_dir / "adapter_model.safetensors")
    for part in ("self_attn.q_proj", "mlp.experts"):
        assert any(part in name and "lora_B" in name and weight.any() for name, weight in weights.items()), part
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, str(trained.adapter_dir)).eval()(ids).logits
    torch.testing.assert_close(after, said[-1], atol=0, rtol=0)
    assert (after - before).abs().max() > 0
    assert (tmp_path / "run" / CHECKPOINTS_DIR).exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_for_gpu_hosts_are_ones_that_accelerate_takes(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and not config.use_cpu
    if path.stem != "one-gpu":
        assert config.distributed_type.value == "FSDP" and config.num_processes >= 8
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_there_are_configurations_for_one_gpu_eight_and_two_nodes():
    assert [path.stem for path in CONFIGS] == ["eight-gpus", "one-gpu", "two-nodes"]
