"""``best-of-n``: corrections, and the best of n fresh samples under the learned reward, are imitated.

Samples carry what the reward model has learned from votes; corrections what no sample shows. Imitation moves the
policy to the answers that people want, and not, as comparisons do, away from what they are compared with: lengths
stay as people like them. The best of n bad samples is still bad: a sample is imitated only if it improves on the
logged answer as much as corrections do. Right answers of its own to tasks are rehearsed beside them, or the policy
unlearns what nobody asks for.

References
----------
Dong et al. (2023), RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment, arXiv 2304.06767.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer import fresh, pairs
from trainer.recipe import MIN_ROWS, Material, Recipe, Rows
from trainer.recipes.sft import SFTConfig, imitating_trainer

MAX_COMPARED = 16  # each costs two encodings
SAMPLED_PART = 6  # one row in so many is kept for samples, where people wrote enough to fill them all


class BestOfNConfig(SFTConfig):
    """Settings of best-of-n."""

    recipe: str = "best-of-n"
    max_rows: int = Field(80, ge=8, description="Most rows that are trained on.")
    max_row_tokens: int = Field(288, ge=32, description="Prompt and answer are cut to this; no sample should be.")
    verifiable_share: float = Field(
        0.4, ge=0, lt=1, description="Of max_rows, share of tasks; right answers to them keep what it can do."
    )
    num_prompts: int = Field(48, ge=1, description="Most prompts that get fresh samples.")
    samples_per_prompt: int = Field(4, ge=2, description="n: the best of these is imitated.")
    min_margin: float = Field(0.3, ge=0, description="Least distance of the best from the mean of its prompt.")


class BestOfN(Recipe[BestOfNConfig]):
    """Demonstrations by people and by luck."""

    Config = BestOfNConfig
    summary = "imitates corrections, the best of n fresh samples, and right answers of its own to tasks"

    def rows(self, material: Material, config: BestOfNConfig) -> Rows:
        """Return the newest corrections, and the best samples as far as there is room."""
        tasks = material.tasks(round(config.max_rows * config.verifiable_share))
        room = config.max_rows - len(tasks)
        demonstrated = pairs.demonstrations(material.data.train, liked=config.liked_answers)
        # Samples cost minutes: no more are made than there is room for, and some always, so that votes count.
        shown = demonstrated.newest(room - room // SAMPLED_PART)
        num_prompts = min(config.num_prompts, room - len(shown.rows))
        made = fresh.take(material, num_prompts, tasks, config.samples_per_prompt, config.seed)
        made.check_spread(len(shown.rows))
        best = pairs.best_of(
            made.prompts,
            made.samples,
            made.rewards,
            min_margin=config.min_margin,
            least_reward=_gain_of_corrections(material),
            words_range=material.words_range,
        )
        best.facts["reward_spread"] = made.spread
        taught = best.then(shown)
        taught.check_number()  # what is rehearsed teaches nothing new
        return pairs.right_ones(made.tasks, made.task_samples, made.verdicts).then(taught)

    def trainer(
        self, config: BestOfNConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's SFT trainer."""
        return imitating_trainer(config, arguments, parts)


def _gain_of_corrections(material: Material) -> float:
    """Return the median reward of the newest corrections against what they correct; nothing is asked of a few."""
    corrected = [example for example in material.data.train if example.corrections][-MAX_COMPARED:]
    if len(corrected) < MIN_ROWS:
        return -math.inf
    gains = material.score(
        [example.messages for example in corrected],
        [[example.corrections[-1]] for example in corrected],
        [example.answer for example in corrected],
    )
    return statistics.median(gain for (gain,) in gains)


RECIPE = BestOfN()
