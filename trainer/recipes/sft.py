"""``sft``: answers that people wrote, preferred or liked, to be answered like that.

References
----------
Ouyang et al. (2022), Training language models to follow instructions with human feedback, arXiv 2203.02155.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer.config import RunConfig
from trainer.pairs import answer_of
from trainer.recipe import Material, Recipe, Rows


class SFTConfig(RunConfig):
    """Settings of supervised fine-tuning."""

    recipe: str = "sft"
    liked_answers: bool = Field(True, description="Train on liked answers too, not on corrections alone.")


class SFT(Recipe[SFTConfig]):
    """Demonstrations."""

    Config = SFTConfig
    summary = "demonstrations: corrections, and answers that were liked or preferred"

    def rows(self, material: Material, config: SFTConfig) -> Rows:
        """Return the newest demonstrations."""
        found = Rows()
        for example in material.data.train:
            for text in example.corrections:
                found.add("corrections", answer_of(example.messages, text, "completion"))
            liked = (example.balance > 0 or example.preferred_over) and not example.corrections
            if liked and config.liked_answers:
                found.add("liked", answer_of(example.messages, example.answer, "completion"))
            elif not example.corrections:
                found.set_aside["no_demonstration"] += 1
        return found.newest(config.max_rows)

    def trainer(
        self, config: SFTConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's SFT trainer; the loss is on the answers alone."""
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer

        return SFTTrainer(
            args=Arguments(**arguments, max_length=config.max_row_tokens, completion_only_loss=True), **parts
        )


RECIPE = SFT()
