"""``sft``: answers that people wrote, preferred or liked, to be answered like that.

References
----------
Ouyang et al. (2022), Training language models to follow instructions with human feedback, arXiv 2203.02155.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer import pairs
from trainer.config import RunConfig
from trainer.pairs import answer_of
from trainer.recipe import Material, Recipe, Rows


class SFTConfig(RunConfig):
    """Settings of supervised fine-tuning."""

    recipe: str = "sft"
    learning_rate: float = Field(1e-3, gt=0)
    epochs: float = Field(3.0, gt=0)
    liked_answers: bool = Field(False, description="Train on liked answers too, not on corrections alone.")


def imitating_trainer(config: SFTConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """Return TRL's SFT trainer on rows with an ``answer``; the loss is on the answers alone."""
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    rows = parts["train_dataset"].map(
        lambda row: answer_of(row["prompt"], row["answer"], "completion"), remove_columns=["answer"]
    )
    return SFTTrainer(
        args=Arguments(**arguments, max_length=config.max_row_tokens, completion_only_loss=True),
        **{**parts, "train_dataset": rows},
    )


class SFT(Recipe[SFTConfig]):
    """Demonstrations."""

    Config = SFTConfig
    summary = "demonstrations: corrections and, if wished, answers that were liked or preferred"

    def rows(self, material: Material, config: SFTConfig) -> Rows:
        """Return the newest demonstrations."""
        return pairs.demonstrations(material.data.train, liked=config.liked_answers).newest(config.max_rows)

    def trainer(
        self, config: SFTConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's SFT trainer."""
        return imitating_trainer(config, arguments, parts)


RECIPE = SFT()
