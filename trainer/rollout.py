"""Fresh samples from the engine that serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infra.engine import EngineClient
from infra.errors import InvalidRequestError
from infra.settings import Settings
from trainer.config import RunConfig

log = logging.getLogger("everloop.night")

MAX_CONCURRENT = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer."""

    text: str
    finish_reason: str


async def sample(
    engine: EngineClient,
    model: str,
    prompts: Sequence[list[dict[str, Any]]],
    *,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[list[Sample]]:
    """Sample `num_samples` answers to each prompt.

    Parameters
    ----------
    on_done
        Called with the number of finished prompts after each.

    Returns
    -------
    list of list of Sample
        One list per prompt, in the order of `prompts`; empty for a prompt that the engine refused.
    """
    # The engine batches sequences, not requests: keep as many sequences in flight as it can hold.
    gate = asyncio.Semaphore(max(1, MAX_CONCURRENT // num_samples))
    done = 0

    async def one(index: int, messages: list[dict[str, Any]]) -> list[Sample]:
        nonlocal done
        async with gate:
            try:
                body = await engine.chat(
                    {
                        "model": model,
                        "messages": messages,
                        "n": num_samples,
                        "max_tokens": max_tokens,
                        "temperature": temperature,
                        "seed": seed * 1_000_003 + index,
                    }
                )
            except InvalidRequestError as error:  # of this prompt alone, such as one that leaves no room to answer
                log.warning("the engine refused a prompt: %s", error.code)
                body = {"choices": []}
        done += 1
        on_done(done)
        return [Sample(choice["message"]["content"] or "", choice["finish_reason"]) for choice in body["choices"]]

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def sample_served(
    settings: Settings,
    config: RunConfig,
    model: str,
    prompts: Sequence[list[dict[str, Any]]],
    num_samples: int,
    seed: int,
    on_done: Callable[[int], None],
) -> list[list[Sample]]:
    """Sample as :func:`sample` does, from the engine and with the lengths that settings and run name."""

    async def ask() -> list[list[Sample]]:
        async with EngineClient(settings.need("engine_url"), timeout_s=settings.engine_timeout_s) as engine:
            return await sample(
                engine,
                model,
                prompts,
                num_samples=num_samples,
                max_tokens=config.max_answer_tokens,
                temperature=config.temperature,
                seed=config.seed + seed,
                on_done=on_done,
            )

    return asyncio.run(ask())
