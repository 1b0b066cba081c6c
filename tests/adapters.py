"""Small base models and adapters for tests, made without torch; and what is done with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import save_file
from sqlalchemy.orm import Session

from deploy import head, registry
from deploy.rollout import Plan
from deploy.tables import Adapter, Attestation, Replica
from infra.db import Sessions
from infra.errors import EverloopError

HIDDEN, INNER, LAYERS = 8, 12, 2
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "auto_mapping": None,
    "modules_to_save": None,
    "bias": "none",
    "use_dora": False,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "loftq_config": {},
    "peft_version": "0.21.2",
    "megatron_core": "megatron.core",
}


def make_base(directory: Path, hidden: int = HIDDEN) -> Path:
    """Write the weights of a base model; `hidden` is its width."""
    directory.mkdir(parents=True)
    scale = hidden // HIDDEN
    weights = {
        f"model.layers.{layer}.{module}.weight": np.zeros((out * scale, num_in * scale), np.float32)
        for layer in range(LAYERS)
        for module, (out, num_in) in MODULES.items()
    }
    weights["model.embed_tokens.weight"] = np.full((16, hidden), hidden, np.float32)
    save_file(weights, directory / "model.safetensors")
    return directory


def tensors(rank: int = 4, seed: int = 0) -> dict[str, Any]:
    """Return the tensors of an adapter of the small base model."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        for module, (out, num_in) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = rng.standard_normal((rank, num_in)).astype(np.float32)
            found[f"{name}.lora_B.weight"] = rng.standard_normal((out, rank)).astype(np.float32)
    return found


def make_adapter(directory: Path, *, weights: dict[str, Any] | None = None, seed: int = 0, **config: Any) -> Path:
    """Write an adapter of the small base model; `config` changes its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors(seed=seed) if weights is None else weights, directory / "adapter_model.safetensors")
    return directory


PLAN = Plan(steps=(0.5,), alpha=0.05, candidate=1, step_users=1, step_s=0.0, max_s=3600.0)
CANARY = {"plan": PLAN, "gates": [], "actor": "test", "reason": "a test"}


def promote(database: Sessions, name: str) -> None:
    """Make a release the champion."""
    with database.begin() as session:
        head.move_champion(session, name, action="promoted_by_hand", actor="test", reason="a test")


def refusal(kind: type[EverloopError], call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the code of the error that a call must raise."""
    with pytest.raises(kind) as refused:
        call(*args, **options)
    return refused.value.code


def adapter_of(session: Session, name: str) -> Adapter:
    """Return the row of a release's adapter."""
    return session.get_one(Adapter, registry.get_release(session, name).adapter_digest)


def serve(session: Session, name: str, problem: str | None = None) -> None:
    """Have the one replica serve a release, or not, as far as the tables tell; it is seen all the time."""
    always = sa.func.now() + timedelta(hours=1)
    session.merge(Replica(url="http://one", is_up=True, spoiled={}, seen_at=always))
    session.flush()
    session.merge(Attestation(release=name, replica="http://one", served_as=name, probe=[], problem=problem))
