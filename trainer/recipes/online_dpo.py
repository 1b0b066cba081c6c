"""``online-dpo``: best against worst of fresh samples under the learned reward, corrections first.

References
----------
Guo et al. (2024), Direct Language Model Alignment from Online AI Feedback, arXiv 2402.04792.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer import pairs
from trainer.recipe import (
    MIN_ROWS,
    MIN_SPREAD,
    Material,
    Recipe,
    Rows,
    UnusableDataError,
    one_per_prompt,
    spread_of,
)
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
        data = material.data
        tasks = material.tasks(round(config.num_prompts * config.verifiable_share))
        examples = one_per_prompt(data.train, config.num_prompts - len(tasks), config.seed)
        prompts = [example.messages for example in examples]
        asked = prompts + [task.messages for task in tasks]
        samples = material.sample(asked, config.samples_per_prompt)
        texts = [[sample.text for sample in group] for group in samples]
        at = len(prompts)
        rewards = material.score(prompts, texts[:at], [e.answer for e in examples])
        found = pairs.best_against_worst(
            prompts, samples[:at], rewards, min_margin=config.min_margin, words_range=material.words_range
        )
        found = found.then(pairs.right_against_wrong(tasks, samples[at:], material.verify(tasks, texts[at:])))
        corrected = pairs.corrections(data.train).newest(config.max_corrections)
        found.facts["reward_spread"] = spread = spread_of(rewards)
        if spread < MIN_SPREAD and len(corrected.rows) < MIN_ROWS:
            raise UnusableDataError(
                f"The rewards of samples to the same prompt hardly differ (median deviation {spread:.3g}): there "
                "is nothing to learn from them. More ratings, samples_per_prompt or temperature may help.",
                code="no_reward_spread",
            )
        return found.newest(max(config.max_rows - len(corrected.rows), 0)).then(corrected)

    def trainer(
        self, config: OnlineDPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's DPO trainer."""
        return preference_trainer(config, arguments, parts)


RECIPE = OnlineDPO()
