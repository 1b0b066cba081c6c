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
        kept = _newest_of_both(found, config.max_rows)
        if len({row["label"] for row in kept.rows}) == 1:
            raise UnusableDataError(
                "All answers are wanted, or none: nothing says what the opposite is.",
                code="one_sided_data",
                set_aside=kept.set_aside,
            )
        return kept

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


def _newest_of_both(rows: Rows, limit: int) -> Rows:
    """Return the newest rows of either label, half of them each where there are as many."""
    numbers = [[n for n, row in enumerate(rows.rows) if row["label"] is label] for label in (True, False)]
    fewer, more = sorted(numbers, key=len)
    fewer = fewer[-(limit // 2) :]
    return rows.only(sorted(fewer + more[-(limit - len(fewer)) :]), "rows_over_budget")


RECIPE = KTO()
