"""TRL's GRPO on samples of the engine that serves: versions, bounded lag, truncated importance weights.

Imports torch and TRL.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from trl import GRPOTrainer

from infra.errors import EverloopError
from trainer.callbacks import Adapter
from trainer.policy import ServedPolicy
from trainer.recipe import Messages
from trainer.rollout import Sample, Sampling, patiently, sample

log = logging.getLogger("everloop.training")
# TRL quotes prompt and answer where all rewards of an answer are None; what people write is for no log.
logging.getLogger("trl.trainer.grpo_trainer").addFilter(lambda record: "returned None for" not in str(record.msg))

Sampler = Callable[[str, Sequence[Messages], int], list[list[Sample]]]


class Rollouts:
    """Samples of a policy as it trains.

    Parameters
    ----------
    policy
        Serves the versions.
    ask
        Returns answers of a version to prompts: ``ask(model, prompts, seed)``.
    num_samples
        K: answers to each prompt.
    prompts
        All that the training will ask for, in order.
    batch_prompts
        How many it asks for at a time.
    ahead
        Batches sampled while the policy trains on those before them; each adds a version of lag.
    max_lag
        Samples of a version further behind are dropped, counted, and made anew.

    Attributes
    ----------
    num_dropped
        Samples that were dropped.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        ask: Sampler,
        *,
        num_samples: int,
        prompts: Sequence[Messages],
        batch_prompts: int,
        ahead: int,
        max_lag: int,
    ) -> None:
        self.policy = policy
        self.num_samples = num_samples
        self.max_lag = max_lag
        self.ahead = ahead
        self.num_dropped = 0
        self._ask = ask
        self._upcoming = deque(
            list(prompts[at : at + batch_prompts]) for at in range(0, len(prompts), batch_prompts)
        )
        self._pending: deque[tuple[list[Messages], Future[list[list[Sample]]]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._num_batches = 0

    def batch(self, prompts: list[Messages]) -> list[list[Sample]]:
        """Return `num_samples` answers to each prompt, none of them too old.

        Raises
        ------
        EverloopError
            Code ``prompt_refused`` where the engine answers a prompt with nothing.
        """
        groups = self._take(prompts)
        old = [at for at, group in enumerate(groups) if group and self.policy.lag(group[0].model) > self.max_lag]
        if old:
            self.num_dropped += sum(len(groups[at]) for at in old)
            log.warning("%d samples were too old and are made anew", self.num_dropped)
            for at, group in zip(old, self._sample([prompts[at] for at in old]), strict=True):
                groups[at] = group
        self._look_ahead()
        if not all(groups):
            raise EverloopError("The engine refused a prompt in mid-training.", code="prompt_refused")
        return groups

    def close(self) -> None:
        """Stop looking ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _take(self, prompts: list[Messages]) -> list[list[Sample]]:
        """Return what was sampled ahead for these prompts, or sample now."""
        if prompts in self._upcoming:  # a run that goes on begins in the middle
            while self._upcoming.popleft() != prompts:
                pass
        while self._pending:
            ahead, future = self._pending.popleft()
            if ahead == prompts:
                return future.result()
            future.cancel()
        return self._sample(prompts)

    def _look_ahead(self) -> None:
        for at in range(len(self._pending), min(self.ahead, len(self._upcoming))):
            prompts = self._upcoming[at]
            self._pending.append((prompts, self._thread.submit(self._sample, prompts)))

    def _sample(self, prompts: list[Messages]) -> list[list[Sample]]:
        self._num_batches += 1
        return self._ask(self.policy.name, prompts, self._num_batches)


class EngineGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer, fed by :class:`Rollouts`.

    TRL weighs each token by ``p_trainer / p_engine``, truncated, where it knows that an engine sampled it; that is
    its switch `use_vllm`. Its own client of vLLM is not used.
    """

    def __init__(self, *, rollouts: Rollouts, **parts: Any) -> None:
        super().__init__(rollout_func=self._roll_out, **parts)
        self.rollouts = rollouts
        self.use_vllm = True
        self.vllm_mode = "server"
        self.vllm_generation = self  # whom TRL tells, once a step, that there are new weights
        self._last_loaded_step = -1

    def sync_weights(self) -> None:
        """Serve the weights as they are now."""

        self.rollouts.policy.publish(Adapter(self).save)

    def close(self) -> None:
        """Stop sampling."""
        self.rollouts.close()

    def _roll_out(self, prompts: list[Messages], _: Any) -> dict[str, list[Any]]:
        """Return ids and log-probabilities of answers to prompts, each of which is there K times in a row."""
        groups = self.rollouts.batch(prompts[:: self.rollouts.num_samples])
        samples = [one for group in groups for one in group]
        lags = [self.rollouts.policy.lag(one.model) for one in samples]
        self._metrics["train"]["rollout/lag"].append(sum(lags) / len(lags))
        self._metrics["train"]["rollout/dropped"].append(float(self.rollouts.num_dropped))
        return {
            "prompt_ids": [list(one.prompt_ids) for one in samples],
            "completion_ids": [list(one.token_ids) for one in samples],
            "logprobs": [list(one.logprobs) for one in samples],
            "finish_reason": [one.finish_reason for one in samples],
        }


def sampler(policy: ServedPolicy, sampling: Sampling, num_samples: int, seed: int) -> Sampler:
    """Return what samples answers of a version from the engine.

    Raises
    ------
    EverloopError
        Code ``logprobs_not_processed`` where answers are sampled from other probabilities than the engine reports.
    """

    def ask(model: str, prompts: Sequence[Messages], number: int) -> list[list[Sample]]:
        # By version: a run that goes on after it was killed samples anew.
        own_seed = seed + zlib.crc32(f"{model.rpartition('@')[2]} {number}".encode())

        async def run() -> list[list[Sample]]:
            async with policy.client() as engine:
                asked = partial(engine.logprobs_are_processed, model)
                mend = partial(policy.restore, engine)
                if number == 1 and not sampling.is_plain and not await patiently(asked, mend):
                    raise EverloopError(
                        "The engine reports log-probabilities from before temperature, top_p and top_k. Start it "
                        "with --logprobs-mode processed_logprobs, or use temperature 1 and neither of them.",
                        code="logprobs_not_processed",
                    )
                return await sample(
                    engine,
                    model,
                    prompts,
                    num_samples=num_samples,
                    sampling=sampling,
                    seed=own_seed,
                    restore=policy.restore,
                )

        return asyncio.run(run())

    return ask
