"""Fresh answers of the assistant as it is served, and what the learned reward and the verifiers make of them."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe import (
    MIN_ROWS,
    MIN_SPREAD,
    Material,
    Messages,
    UnusableDataError,
    one_per_prompt,
    spread_of,
)
from trainer.rollout import Sample
from trainer.verify import Task


@dataclass(frozen=True, slots=True)
class Fresh:
    """Samples and their rewards, those of people's prompts and those of tasks apart."""

    prompts: list[Messages]
    samples: list[list[Sample]]
    rewards: list[list[float]]
    tasks: list[Task]
    task_samples: list[list[Sample]]
    verdicts: list[list[float | None]]

    @property
    def spread(self) -> float:
        """How much the rewards of samples to one prompt differ."""
        return spread_of(self.rewards)

    def check_spread(self, num_others: int) -> None:
        """Refuse to train on samples that are as good as each other, where there is not enough besides them.

        Raises
        ------
        UnusableDataError
            Code ``no_reward_spread``.
        """
        if self.spread < MIN_SPREAD and num_others < MIN_ROWS:
            raise UnusableDataError(
                f"The rewards of samples to the same prompt hardly differ (median deviation {self.spread:.3g}): "
                "there is nothing to learn from them. More ratings, samples_per_prompt or temperature may help.",
                code="no_reward_spread",
            )


def take(material: Material, num_prompts: int, tasks: list[Task], num_samples: int, seed: int) -> Fresh:
    """Sample answers to prompts of people and to tasks, and score them."""
    examples = one_per_prompt(material.data.train, num_prompts, seed)
    prompts = [example.messages for example in examples]
    samples = material.sample(prompts + [task.messages for task in tasks], num_samples)
    texts = [[sample.text for sample in group] for group in samples]
    at = len(prompts)
    return Fresh(
        prompts,
        samples[:at],
        material.score(prompts, texts[:at], [example.answer for example in examples]),
        tasks,
        samples[at:],
        material.verify(tasks, texts[at:]),
    )
