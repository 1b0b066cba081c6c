"""The bench's own adapters: of the base model's shapes, and never left in the engine."""

import asyncio
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flows.bench import adapters
from infra.errors import InvalidRequestError, UnavailableError

SHAPES = {"model.layers.0.self_attn.k_proj": (8, 24), "model.layers.0.mlp.down_proj": (24, 40)}


@pytest.fixture
def model(tmp_path):
    """A model directory with two linear layers and one that is none."""
    weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    save_file({**weights, "model.norm.weight": np.ones(24, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_shapes_are_the_models(model):
    assert adapters.linear_shapes(model) == SHAPES


def test_a_model_without_linear_layers_is_refused(tmp_path):
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidRequestError, match="no layers"):
        adapters.linear_shapes(tmp_path)


def test_an_adapter_changes_every_layer(tmp_path):
    adapters.write_adapter(tmp_path / "a", SHAPES, rank=4, seed=0)
    adapters.write_adapter(tmp_path / "b", SHAPES, rank=4, seed=1)
    tensors, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, (out, width) in SHAPES.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert a.shape == (4, width) and b.shape == (out, 4)
        assert (b @ a).any()
    assert not any(np.array_equal(tensors[key], others[key]) for key in tensors)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["target_modules"] == ["down_proj", "k_proj"]


class Engine:
    """The part of the engine that holds adapters; the answer to a load may be lost after it took effect."""

    def __init__(self):
        self.held = ["base", "somebodys"]
        self.lost_after = None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def models(self):
        return list(self.held)

    async def load_adapter(self, name, path):
        assert (path / "adapter_model.safetensors").exists()
        self.held.append(name)
        if len(self.held) - 2 == self.lost_after:
            raise UnavailableError("lost", code="lost")

    async def unload_adapter(self, name):
        self.held.remove(name)


@pytest.mark.parametrize("failure", ["no", "of a load", "within"])
def test_nothing_stays_in_the_engine(model, monkeypatch, failure):
    engine = Engine()
    engine.lost_after = 2 if failure == "of a load" else None
    monkeypatch.setattr(adapters, "EngineClient", lambda url, key: engine)

    async def use():
        async with adapters.random_adapters("http://engine", model, 3, 4) as names:
            assert engine.held == ["base", "somebodys", *names]
            assert len(set(names)) == 3
            if failure == "within":
                raise UnavailableError("broken", code="broken")

    if failure == "no":
        asyncio.run(use())
    else:
        with pytest.raises(UnavailableError):
            asyncio.run(use())
    assert engine.held == ["base", "somebodys"]
