"""``everloop bench serving``: the base model, adapters, and the gateway, side by side in one run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from flows.bench.adapters import random_adapters
from infra import report
from infra.settings import BASE_MODEL_NAME, Settings

NUM_STREAMS = 16
ANSWER_TOKENS = 64
NUM_ADAPTERS = 4

Variants = dict[str, Callable[[], Awaitable[float]]]

COMPARED_WITH = {
    "gateway, base": "engine, base",
    "engine, 1 adapter": "engine, base, full length",
    "engine, 4 adapters": "engine, base, full length",
}
"""An adapter's answers end elsewhere than the base model's, so these write to the full length: equal work."""


def serving(settings: Settings, runs: int) -> dict[str, Any]:
    """Return tokens per second of each variant and their ratios within the same run.

    The adapters are made for the bench (random, on every linear layer, of the rank that the engine takes at most)
    and served beside what is deployed.

    Returns
    -------
    dict
        ``variants``; and medians of ratios: ``gateway_ratio``, ``lora1_ratio`` (one adapter over the base model),
        ``lora4_ratio`` (four adapters mixed over the base model).
    """
    figures = asyncio.run(_measure(settings, runs))
    result: dict[str, Any] = {"streams": NUM_STREAMS, "runs": runs, "variants": {}}
    for name, values in figures.items():
        compared = COMPARED_WITH.get(name)
        ratios = [value / base for value, base in zip(values, figures[compared or name], strict=True)]
        result["variants"][name] = {
            "tokens_per_s": statistics.median(values),
            "ratio": statistics.median(ratios),
            "of": compared,
            "runs": [round(v) for v in values],
        }
    result["gateway_ratio"] = result["variants"]["gateway, base"]["ratio"]
    result["lora1_ratio"] = result["variants"]["engine, 1 adapter"]["ratio"]
    result["lora4_ratio"] = result["variants"]["engine, 4 adapters"]["ratio"]
    return result


async def _measure(settings: Settings, runs: int) -> dict[str, list[float]]:
    engine, gateway = settings.need("engine_url"), settings.need("public_url")
    base = [BASE_MODEL_NAME]
    async with random_adapters(engine, settings.base_model_dir, NUM_ADAPTERS, settings.max_lora_rank) as names:
        variants: Variants = {
            "engine, base": lambda: _tokens_per_s(engine, base, {}),
            # A bench must teach nothing.
            "gateway, base": lambda: _tokens_per_s(gateway, base, {"store": False}),
            "engine, base, full length": lambda: _tokens_per_s(engine, base, {"ignore_eos": True}),
            "engine, 1 adapter": lambda: _tokens_per_s(engine, names[:1], {"ignore_eos": True}),
            "engine, 4 adapters": lambda: _tokens_per_s(engine, names, {"ignore_eos": True}),
        }
        return await _interleave(variants, runs)


async def _interleave(variants: Variants, runs: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {name: [] for name in variants}
    with report.Phase("bench serving", runs * len(variants) + len(variants)) as phase:
        for variant in variants.values():
            await variant()  # warm-up, not counted
            phase.advance()
        for _ in range(runs):
            for name, variant in variants.items():
                figures[name].append(await variant())
                phase.advance()
    return figures


async def _tokens_per_s(url: str, models: Sequence[str], options: dict[str, Any]) -> float:
    """Ask on all streams at once, the models in turn."""
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:

        async def one(number: int) -> int:
            question = f"Tell me the whole story of the number {number}."
            body = {
                "model": models[number % len(models)],
                "messages": [{"role": "user", "content": question}],
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0.8,
                "seed": number,
                **options,
            }
            response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            return int(response.json()["usage"]["completion_tokens"])

        started_s = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(number) for number in range(NUM_STREAMS))))
        return tokens / (time.perf_counter() - started_s)
