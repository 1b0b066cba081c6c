"""``grpo``: answers of the policy as it trains, each against the others to the same prompt.

References
----------
Shao et al. (2024), DeepSeekMath, arXiv 2402.03300.
Yao et al. (2025), Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (truncated weights).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from infra.errors import EverloopError
from trainer.config import RunConfig
from trainer.recipe import Material, Messages, Recipe, Rows, one_per_prompt, spread_of
from trainer.scoring import guarded
from trainer.verify import Task


class GRPOConfig(RunConfig):
    """Settings of GRPO. Rows are answers; a step takes ``batch_rows / samples_per_prompt`` prompts."""

    recipe: str = "grpo"
    batch_rows: int = Field(32, ge=1, description="Answers per optimiser step.")
    micro_batch_rows: int = Field(8, ge=1, description="Answers per forward pass.")
    samples_per_prompt: int = Field(8, ge=2, description="K: answers that are held against each other.")
    max_row_tokens: int = Field(512, ge=32, description="Prompt and answer; prompts without room are left out.")
    max_rows: int = Field(32, ge=8, description="Most prompts.")
    beta: float = Field(0.02, ge=0, description="Weight of the KL to where the run started.")
    iterations: int = Field(1, ge=1, description="Optimiser steps on the same answers.")
    rollouts_ahead: int = Field(0, ge=0, le=4, description="Batches sampled while the policy trains.")
    max_lag: int = Field(4, ge=0, le=4, description="Answers of a version further behind are dropped.")
    importance_clip: float = Field(2.0, gt=0, description="Importance weights are truncated here.")

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.batch_rows % self.samples_per_prompt:
            raise ValueError(f"batch_rows must be a multiple of samples_per_prompt ({self.samples_per_prompt})")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_row_tokens leaves no room beside max_answer_tokens ({self.max_answer_tokens})")
        if self.recipe == "grpo" and self.accelerate_config is not None:
            raise ValueError("grpo samples and trains in one process: leave accelerate_config out")
        return self

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt: nothing is cut, and an answer takes what it takes."""
        return self.max_row_tokens - self.max_answer_tokens

    @property
    def rows_per_step(self) -> int:
        """Prompts that an optimiser step takes; its batch is counted in answers."""
        return self.batch_rows // self.samples_per_prompt


class GRPO(Recipe[GRPOConfig]):
    """Fresh answers of the policy, in groups."""

    Config = GRPOConfig
    summary = "answers of the policy as it trains, under the learned reward and verifiers, group by group"
    publishes = True
    whole_batches = True

    def rows(self, material: Material, config: GRPOConfig) -> Rows:
        """Return prompts, with the answer that people rated or the task's key."""
        found = Rows()
        tasks = material.tasks(round(config.max_rows * config.verifiable_share))
        for example in one_per_prompt(material.data.train, config.max_rows - len(tasks), config.seed):
            found.add("prompts", {"prompt": example.messages, "reference": example.answer, "task": ""})
        for task in tasks:
            kept = json.dumps({"skill": task.skill, "key": task.key})
            found.add("tasks", {"prompt": task.messages, "reference": "", "task": kept})
        return found.shuffled(config.seed)

    def trainer(
        self, config: GRPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's GRPO trainer on answers of the serving engine."""
        from trl import GRPOConfig as Arguments

        from trainer.grpo import EngineGRPOTrainer, Rollouts, sampler
        from trainer.rollout import Sampling

        policy = material.policy
        if policy is None:
            raise EverloopError("GRPO samples from an engine, and there is none.", code="engine_needed")
        policy.keep = config.rollouts_ahead + 1
        rollouts = Rollouts(
            policy,
            sampler(policy, Sampling.of(config), config.samples_per_prompt, config.seed),
            num_samples=config.samples_per_prompt,
            prompts=_asked(list(parts["train_dataset"]["prompt"]), config),
            batch_prompts=config.rows_per_step,
            ahead=config.rollouts_ahead,
            max_lag=config.max_lag,
        )
        return EngineGRPOTrainer(
            rollouts=rollouts,
            reward_funcs=[
                learned(material, material.words_range, config.samples_per_prompt),
                verified(material),
            ],
            args=Arguments(
                **arguments,
                num_generations=config.samples_per_prompt,
                max_completion_length=config.max_answer_tokens,
                temperature=config.temperature,
                beta=config.beta,
                num_iterations=config.iterations,
                shuffle_dataset=False,  # they are shuffled already, and rollouts look ahead
                vllm_importance_sampling_mode="token_truncate",
                vllm_importance_sampling_clip_max=config.importance_clip,
            ),
            **parts,
        )


def _asked(prompts: list[Messages], config: GRPOConfig) -> list[Messages]:
    """Return the prompts of all steps, in the order in which TRL takes them."""
    steps = math.ceil(len(prompts) // config.rows_per_step * config.epochs)
    return (prompts * math.ceil(config.epochs))[: steps * config.rows_per_step]


def learned(
    material: Material, words_range: tuple[int, int], num_samples: int
) -> Callable[..., list[float | None]]:
    """Return the learned reward as TRL asks for it: pessimistic, clipped, lowest outside people's lengths."""

    def reward(
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        reference: Sequence[str],
        task: Sequence[str],
        finish_reason: Sequence[str],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        firsts = [at for at in range(0, len(prompts), num_samples) if not task[at]]
        groups = [range(at, at + num_samples) for at in firsts]
        texts = [[_text(completions[n]) for n in group] for group in groups]
        scores = material.score([prompts[at] for at in firsts], texts, [reference[at] for at in firsts])
        rewards: list[float | None] = [None] * len(prompts)
        for group, answers, scored in zip(groups, texts, scores, strict=True):
            ended = [finish_reason[n] == "stop" for n in group]
            for n, value in zip(group, guarded(scored, answers, ended, words_range), strict=True):
                rewards[n] = value if math.isfinite(value) else None
        if scores:
            log_metric("reward_spread", spread_of(scores))
            log_metric("reward_not_finite", float(sum(not math.isfinite(one) for group in scores for one in group)))
        return rewards

    return reward


def verified(material: Material) -> Callable[..., list[float | None]]:
    """Return the verifiers' verdict as TRL asks for it."""

    def verdict(
        prompts: Sequence[Messages], completions: Sequence[Messages], task: Sequence[str], **_: Any
    ) -> list[float | None]:
        at = [n for n, kept in enumerate(task) if kept]
        tasks = [Task(messages=prompts[n], **json.loads(task[n])) for n in at]
        verdicts = material.verify(tasks, [[_text(completions[n])] for n in at])
        rewards: list[float | None] = [None] * len(prompts)
        for n, (value,) in zip(at, verdicts, strict=True):
            rewards[n] = value
        return rewards

    return verdict


def _text(completion: Messages) -> str:
    return str(completion[-1]["content"])


RECIPE = GRPO()
