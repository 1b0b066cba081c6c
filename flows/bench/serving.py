"""``everloop bench serving``: the base model, adapters, and the gateway, side by side in one run."""

from __future__ import annotations

import asyncio
import re
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flows.bench.adapters import random_adapters
from flows.bench.load_generator import load
from infra import report
from infra.settings import BASE_MODEL_NAME, Settings

NUM_STREAMS = 16
ANSWER_TOKENS = 64
NUM_ADAPTERS = 4

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
Variants = dict[str, Callable[[], Awaitable[float]]]

COMPARED_WITH = {
    "gateway, base": "engine, base",
    "gateway, base, streamed": "engine, base, streamed",
    "engine, base, all that the gateway asks": "engine, base, streamed",
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
        ``variants``; and medians of ratios: ``gateway_ratio`` (whole answers), ``gateway_streamed_ratio``,
        ``lora1_ratio`` (one adapter over the base model), ``lora4_ratio`` (four adapters mixed).
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
    result["gateway_streamed_ratio"] = result["variants"]["gateway, base, streamed"]["ratio"]
    result["lora1_ratio"] = result["variants"]["engine, 1 adapter"]["ratio"]
    result["lora4_ratio"] = result["variants"]["engine, 4 adapters"]["ratio"]
    return result


async def _measure(settings: Settings, runs: int) -> dict[str, list[float]]:
    engine, gateway = settings.need("engine_url"), settings.need("public_url")
    base, at_gateway = [BASE_MODEL_NAME], settings.credentials
    own = {"store": False}  # a bench must teach nothing
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    asked = {**streamed, "logprobs": True, "return_token_ids": True}
    at_engine, rank = settings.engine_credentials, settings.max_lora_rank
    async with random_adapters(engine, settings.base_model_dir, NUM_ADAPTERS, rank, settings.engine_key) as names:
        variants: Variants = {
            "engine, base": lambda: _tokens_per_s(engine, base, {}, at_engine),
            "gateway, base": lambda: _tokens_per_s(gateway, base, own, at_gateway),
            "engine, base, streamed": lambda: _tokens_per_s(engine, base, streamed, at_engine),
            "gateway, base, streamed": lambda: _tokens_per_s(gateway, base, {**own, **streamed}, at_gateway),
            "engine, base, all that the gateway asks": lambda: _tokens_per_s(engine, base, asked, at_engine),
            "engine, base, full length": lambda: _tokens_per_s(engine, base, {"ignore_eos": True}, at_engine),
            "engine, 1 adapter": lambda: _tokens_per_s(engine, names[:1], {"ignore_eos": True}, at_engine),
            "engine, 4 adapters": lambda: _tokens_per_s(engine, names, {"ignore_eos": True}, at_engine),
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


async def _tokens_per_s(url: str, models: Sequence[str], options: dict[str, Any], headers: dict[str, str]) -> float:
    """Ask on all streams at once, the models in turn."""

    def body_of(number: int) -> dict[str, Any]:
        return {
            "model": models[number % len(models)],
            "messages": [{"role": "user", "content": f"Tell me the whole story of the number {number}."}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0.8,
            "seed": number,
            **options,
        }

    counts: dict[str, Any] = {"num_connections": NUM_STREAMS, "num_requests": NUM_STREAMS}
    measured = await load(url, body_of, num_tokens_of=_num_tokens, headers=headers, **counts)
    if measured.failures:
        raise RuntimeError(measured.failures[0])
    return measured.num_tokens / measured.seconds


def _num_tokens(answer: bytes) -> int:
    """Return what an answer, or its last chunk, says of its length."""
    return int(_COMPLETION_TOKENS.findall(answer)[-1])
