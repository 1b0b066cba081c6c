"""``kto``: single answers that people liked or not; no comparison is needed.

References
----------
Ethayarajh et al. (2024), KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer.config import RunConfig
from trainer.pairs import answer_of
from trainer.recipe import Material, Recipe, Rows, UnusableDataError

# The paper's range for the weight of what is wanted against what is not, as they are in number.
LEAST_RATIO, MOST_RATIO = 1.0, 4.0 / 3.0


class KTOConfig(RunConfig):
    """Settings of KTO."""

    recipe: str = "kto"
    beta: float = Field(0.1, gt=0, description="KL strength.")


class KTO(Recipe[KTOConfig]):
    """Thumbs and ratings."""

    Config = KTOConfig
    summary = "answers with a thumb or rating, one by one; corrections as wanted, what they correct as not"

    def rows(self, material: Material, config: KTOConfig) -> Rows:
        """Return answers and whether they are wanted, the newest of both kinds."""
        found = Rows()
        for example in material.data.train:
            wanted = example.balance > 0 and not example.corrections
            if example.balance or example.corrections:
                found.add(
                    "verdicts", {**answer_of(example.messages, example.answer, "completion"), "label": wanted}
                )
            else:
                found.set_aside["neither_liked_nor_disliked"] += 1
            for text in example.corrections:
                found.add("corrections", {**answer_of(example.messages, text, "completion"), "label": True})
        labels = {row["label"] for row in found.rows}
        if len(labels) == 1:
            side = "liked" if labels == {True} else "disliked"
            raise UnusableDataError(
                f"All {len(found.rows)} answers are {side}: nothing says what the opposite is.",
                code="one_sided_data",
            )
        return found.newest(config.max_rows)

    def trainer(
        self, config: KTOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's KTO trainer, both sides weighed alike in all."""
        from trl import KTOConfig as Arguments
        from trl import KTOTrainer

        labels = parts["train_dataset"]["label"]
        num_wanted = max(sum(labels), 1)
        num_unwanted = max(len(labels) - sum(labels), 1)
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        ratio = num_wanted / num_unwanted
        if ratio < LEAST_RATIO:
            weights["desirable_weight"] = LEAST_RATIO / ratio
        elif ratio > MOST_RATIO:
            weights["undesirable_weight"] = ratio / MOST_RATIO
        return KTOTrainer(
            args=Arguments(**arguments, **weights, beta=config.beta, max_length=config.max_row_tokens), **parts
        )


RECIPE = KTO()
