"""``dpo``: what people compared, as it is: corrections, preferences, and liked against disliked answers.

References
----------
Rafailov et al. (2023), Direct Preference Optimization, arXiv 2305.18290.
Liu et al. (2024), Length Desensitization in Direct Preference Optimization, arXiv 2409.06411.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer.config import RunConfig
from trainer.pairs import compared
from trainer.recipe import Material, Recipe, Rows


class DPOConfig(RunConfig):
    """Settings of DPO."""

    recipe: str = "dpo"
    beta: float = Field(0.1, gt=0, description="KL strength.")
    tail_weight: float = Field(
        1.0, ge=0, le=1, description="Weight of what a longer answer has beyond the shorter one's length (LD-DPO)."
    )
    sft_weight: float = Field(0.0, ge=0, description="Weight of likelihood on the chosen answer.")


def preference_trainer(config: DPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """Return TRL's DPO trainer."""
    from trl import DPOConfig as Arguments
    from trl import DPOTrainer

    losses: dict[str, Any] = {}
    if config.sft_weight:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.sft_weight]}
    return DPOTrainer(
        args=Arguments(
            **arguments,
            **losses,
            beta=config.beta,
            ld_alpha=config.tail_weight if config.tail_weight < 1.0 else None,
            max_length=config.max_row_tokens,
        ),
        **parts,
    )


class DPO(Recipe[DPOConfig]):
    """Comparisons that people made."""

    Config = DPOConfig
    summary = "corrections, preferences, and liked against disliked answers to the same messages"

    def rows(self, material: Material, config: DPOConfig) -> Rows:
        """Return the newest comparisons."""
        return compared(material.data.train).newest(config.max_rows)

    def trainer(
        self, config: DPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's DPO trainer."""
        return preference_trainer(config, arguments, parts)


RECIPE = DPO()
