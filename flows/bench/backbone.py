"""``everloop bench backbone``: whether a trained reward backbone would replace the frozen features."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from flows.bench.pairs import differences, read_pairs
from infra import report
from infra.settings import load
from reward.backbone_config import BackboneConfig
from reward.base_model_encoder import BaseModelEncoder
from reward.contest import compare, num_newest
from reward.encoder import open_encoder
from reward.judged import Judged


def measure(path: Path, config: BackboneConfig) -> dict[str, Any]:
    """Train on the newest of the older pairs, and judge on the newest tenth: training's facts and the contest."""
    from reward.backbone_training import train

    settings = load()
    pairs = [
        Judged(list(chosen[0]), chosen[1], rejected[1], "preference", (f"line-{n}",), ("", ""), n)
        for n, (chosen, rejected) in enumerate(read_pairs(path))
        if chosen[0] == rejected[0]
    ]
    num_judged = num_newest(len(pairs))
    trained = pairs[: len(pairs) - num_judged][-config.max_pairs :]
    kept = np.array([pair.seq for pair in pairs])
    active = open_encoder(settings)
    with tempfile.TemporaryDirectory(prefix="everloop-backbone-") as work_dir:
        report.say(f"training a backbone on {len(trained)} pairs")
        adapter_dir, facts = train(settings.base_model_dir, settings.encoder_layer, trained, config, Path(work_dir))
        candidate = BaseModelEncoder(settings.base_model_dir, settings.encoder_layer, adapter_dir=adapter_dir)
        z, z_candidate = (differences(settings, encoder, path)[kept] for encoder in (active, candidate))
    contest = compare((active.name, z), (candidate.name, z_candidate), np.ones(len(pairs)), num_judged)
    return {"training": facts, "contest": contest.as_dict()}
