"""Random adapters of the base model's shapes, held by the running engine while a bench measures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from infra.engine import EngineClient
from infra.errors import InvalidRequestError
from infra.ids import new_id

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_SCALE = 0.01  # small beside the weights, so that answers stay text


@asynccontextmanager
async def random_adapters(
    url: str, base_model: Path, num: int, rank: int, key: str | None = None
) -> AsyncIterator[list[str]]:
    """Load adapters into an engine under names that it never had; unload them at the end whatever happens.

    Parameters
    ----------
    url
        Root address of a vLLM server that sees this machine's files.
    base_model
        Directory of the model that it serves.
    num, rank
        How many adapters, and their rank.
    key
        What the server asks for, if it does.

    Yields
    ------
    list of str
        The names under which they are served.
    """
    shapes = linear_shapes(base_model)
    names = [f"bench/{new_id('bench')}-{number}" for number in range(num)]
    with tempfile.TemporaryDirectory(prefix="everloop-bench-") as directory:
        async with EngineClient(url, key) as engine, AsyncExitStack() as loaded:
            for number, name in enumerate(names):
                path = Path(directory) / str(number)
                write_adapter(path, shapes, rank, seed=number)
                # Before it is loaded: an answer that is lost on the way leaves it loaded all the same.
                loaded.push_async_callback(_unload, engine, name)
                await engine.load_adapter(name, path)
            yield names


async def _unload(engine: EngineClient, name: str) -> None:
    if name in await engine.models():
        await engine.unload_adapter(name)


def linear_shapes(base_model: Path) -> dict[str, tuple[int, int]]:
    """Return (output width, input width) of each linear layer, by its name in the model."""
    shapes = {}
    for path in sorted(base_model.glob("*.safetensors")):
        with safe_open(path, framework="np") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(tuple(f".{name}.weight" for name in LINEAR)):
                    out, width = weights.get_slice(key).get_shape()
                    shapes[key.removesuffix(".weight")] = (out, width)
    if not shapes:
        raise InvalidRequestError(f"{base_model} has no layers named {', '.join(LINEAR)}.", code="no_linear_layers")
    return shapes


def write_adapter(directory: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
    """Write a LoRA adapter in PEFT's format, A and B random, on every layer of ``shapes``."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (out, width) in shapes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _normal(random, (rank, width), width**-0.5)
        tensors[f"{prefix}.lora_B.weight"] = _normal(random, (out, rank), B_SCALE)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _normal(random: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype(np.float32)
