"""``online-dpo``: best against worst of fresh samples under the learned reward, corrections first.

References
----------
Guo et al. (2024), Direct Language Model Alignment from Online AI Feedback, arXiv 2402.04792.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer import fresh, pairs
from trainer.recipe import Material, Recipe, Rows
from trainer.recipes.dpo import DPOConfig, preference_trainer


class OnlineDPOConfig(DPOConfig):
    """Settings of online DPO."""

    recipe: str = "online-dpo"
    num_prompts: int = Field(48, ge=1, description="Prompts that get fresh samples.")
    samples_per_prompt: int = Field(4, ge=2, description="K: best against worst of these.")
    max_corrections: int = Field(32, ge=0, description="Newest corrections used as pairs.")
    min_margin: float = Field(0.3, ge=0, description="Least reward difference within a pair.")


class OnlineDPO(Recipe[OnlineDPOConfig]):
    """Pairs of fresh samples."""

    Config = OnlineDPOConfig
    summary = "best against worst of fresh samples under the learned reward, and corrections"

    def rows(self, material: Material, config: OnlineDPOConfig) -> Rows:
        """Sample, score, and pair."""
        tasks = material.tasks(round(config.num_prompts * config.verifiable_share))
        made = fresh.take(material, config.num_prompts - len(tasks), tasks, config.samples_per_prompt, config.seed)
        corrected = pairs.corrections(material.data.train).newest(config.max_corrections)
        made.check_spread(len(corrected.rows))
        found = pairs.best_against_worst(
            made.prompts,
            made.samples,
            made.rewards,
            min_margin=config.min_margin,
            words_range=material.words_range,
        )
        found = found.then(pairs.right_against_wrong(made.tasks, made.task_samples, made.verdicts))
        found.facts["reward_spread"] = made.spread
        return found.newest(max(config.max_rows - len(corrected.rows), 0)).then(corrected)

    def trainer(
        self, config: OnlineDPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's DPO trainer."""
        return preference_trainer(config, arguments, parts)


RECIPE = OnlineDPO()
