"""``async-grpo``: GRPO whose answers are sampled while it trains, for hosts with GPUs (TRL's AsyncGRPOTrainer).

Answers come from the serving engine without pause; each new adapter is handed to it, and what is more than
`max_lag` versions old is dropped. There is no KL term: what bounds the distance to the base is which checkpoint is
taken (:mod:`trainer.peak`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from infra.errors import EverloopError
from trainer.recipe import Material, Messages, Recipe, Rows
from trainer.recipes import grpo
from trainer.recipes.grpo import GRPOConfig

REWARDS = ("learned", "verified")


class AsyncGRPOConfig(GRPOConfig):
    """Settings of asynchronous GRPO; `beta`, `iterations`, `importance_clip` and `rollouts_ahead` mean nothing."""

    recipe: str = "async-grpo"
    max_waiting: int = Field(1024, ge=1, description="Scored answers that may wait for the training.")


class AsyncGRPO(Recipe[AsyncGRPOConfig]):
    """Answers of the policy, sampled without pause."""

    Config = AsyncGRPOConfig
    summary = "grpo whose sampling never waits for the training; for hosts with GPUs"
    publishes = True

    def rows(self, material: Material, config: AsyncGRPOConfig) -> Rows:
        """Return prompts, as `grpo` does."""
        return grpo.RECIPE.rows(material, config)

    def trainer(
        self, config: AsyncGRPOConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's asynchronous GRPO trainer, which loads the base model itself and begins a new adapter.

        Raises
        ------
        EverloopError
            Codes ``gpu_needed``, ``engine_needed``; ``adapter_not_continued`` where the champion is an adapter.
        """
        import torch
        from trl.experimental.async_grpo import AsyncGRPOTrainer

        if not torch.cuda.is_available():
            raise EverloopError(
                "async-grpo trains with attention kernels that need a GPU, and there is none here. The recipe grpo "
                "does the same in turns.",
                code="gpu_needed",
            )
        if material.policy is None:
            raise EverloopError("async-grpo samples from an engine, and there is none.", code="engine_needed")
        given = dict(parts)
        model = given.pop("model")
        if "peft_config" not in given:
            raise EverloopError(
                "async-grpo begins a new adapter, and what the champion's has learned would be lost. Use grpo, or "
                "merge the champion into a base model.",
                code="adapter_not_continued",
            )
        return AsyncGRPOTrainer(
            model=model.name_or_path,
            reward_funcs=[RunReward(material.policy.run_id, name, config.max_answer_tokens) for name in REWARDS],
            args=self.arguments(config, arguments, material.policy.engine_url),
            **given,
        )

    def arguments(self, config: AsyncGRPOConfig, arguments: Mapping[str, Any], engine_url: str) -> Any:
        """Return TRL's configuration."""
        from trl.experimental.async_grpo import AsyncGRPOConfig as Arguments

        return Arguments(
            **arguments,
            num_generations=config.samples_per_prompt,
            max_completion_length=config.max_answer_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k or -1,
            vllm_server_base_url=engine_url,
            max_staleness=config.max_lag,
            queue_maxsize=config.max_waiting,
        )


class RunReward:
    """A reward of a run, in the process that TRL samples and scores in: it looks up there what it needs.

    Parameters
    ----------
    name
        ``learned`` or ``verified``.
    max_tokens
        Of an answer; one that has as many was cut off.
    """

    def __init__(self, run_id: str, name: str, max_tokens: int) -> None:
        self.run_id = run_id
        self.__name__ = name
        self.max_tokens = max_tokens
        self._reward: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to one process."""
        return {**self.__dict__, "_reward": None}

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Messages], **columns: Any
    ) -> list[float | None]:
        """Return the rewards, as TRL asks for them."""
        if self._reward is None:
            self._reward = self._open()
        # TRL does not tell why an answer ended: one that was cut off has as many tokens as it may have.
        reasons = ["length" if len(ids) >= self.max_tokens else "stop" for ids in columns["completion_ids"]]
        rewards: list[float | None] = self._reward(
            prompts=prompts,
            completions=completions,
            finish_reason=reasons,
            log_metric=lambda name, value: None,
            **columns,
        )
        return rewards

    def _open(self) -> Any:
        from trainer.worker import open_run

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        training, policy = open_run(self.run_id)
        material, config = training.material(policy), training.config
        if self.__name__ == "verified":
            return grpo.verified(material)
        return grpo.learned(material, material.words_range, getattr(config, "samples_per_prompt", 1))


RECIPE = AsyncGRPO()
