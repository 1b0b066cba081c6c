"""``everloop bench rollouts``: do people notice that a run samples from the engine that answers them?"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from flows.bench.stack import own_stack
from flows.population import read_prompts
from flows.preferences import BUILT_IN_PROMPTS
from infra import report
from infra.engine import EngineClient
from infra.settings import BASE_MODEL_NAME, Settings
from trainer.rollout import BESIDE_PEOPLE, MAX_IN_FLIGHT, Sampling, sample
from trainer.throttle import Throttle

NUM_SAMPLES = 4
PERSON_TOKENS = 48
THINKING_S = 1.0


def measure(seconds: float, runs: int) -> dict[str, Any]:
    """Let a person ask again and again; return medians of the time to the first token and of tokens a second.

    Returns
    -------
    dict
        ``alone``, ``throttled`` and ``unthrottled``, each with ``first_token_s``, ``tokens_per_s``, ``n`` and
        ``samples_per_s`` (of the run); and ratios to ``alone``.
    """
    prompts = [[{"role": "user", "content": prompt}] for prompt in read_prompts(BUILT_IN_PROMPTS)]
    found: dict[str, list[dict[str, Any]]] = {"alone": [], "throttled": [], "unthrottled": []}
    parts = {"postgres", "broker", "engine", "reconciler", "api"}
    with own_stack(parts) as (settings, _, _), report.Phase("loads", runs * len(found)) as phase:
        for number in range(runs):
            for kind, results in found.items():
                results.append(asyncio.run(_load(settings, kind, prompts, seconds, number)))
                phase.advance()
    merged = {kind: _merged(results) for kind, results in found.items()}
    alone = merged["alone"]
    for kind in ("throttled", "unthrottled"):
        merged[kind]["first_token_ratio"] = merged[kind]["first_token_s"] / alone["first_token_s"]
        merged[kind]["tokens_per_s_ratio"] = merged[kind]["tokens_per_s"] / alone["tokens_per_s"]
    return merged


async def _load(
    settings: Settings, kind: str, prompts: Sequence[list[dict[str, Any]]], seconds: float, seed: int
) -> dict[str, Any]:
    async with EngineClient(settings.need("engine_url"), settings.engine_key) as engine:
        done: list[float] = []
        throttle = Throttle(MAX_IN_FLIGHT, BESIDE_PEOPLE if kind == "throttled" else MAX_IN_FLIGHT)
        sampling = None
        if kind != "alone":
            sampling = asyncio.create_task(
                sample(
                    engine,
                    BASE_MODEL_NAME,
                    list(prompts),
                    num_samples=NUM_SAMPLES,
                    sampling=Sampling(96),
                    seed=seed,
                    on_done=lambda _: done.append(time.monotonic()),
                    throttle=throttle,
                )
            )
            await asyncio.sleep(3.0)  # until the engine is full
        started_s = time.monotonic()
        asked: list[tuple[float, float]] = []
        while time.monotonic() - started_s < seconds:
            asked.append(await _ask(engine, prompts[(7 * len(asked) + seed) % len(prompts)]))
            await asyncio.sleep(THINKING_S)
        ended_s = time.monotonic()
        if sampling is not None:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling
    during = [at for at in done if started_s <= at <= ended_s]
    return {"asked": asked, "samples_per_s": NUM_SAMPLES * len(during) / (ended_s - started_s)}


async def _ask(engine: EngineClient, messages: list[dict[str, Any]]) -> tuple[float, float]:
    """Return (seconds to the first token, tokens a second after it)."""
    payload = {"model": BASE_MODEL_NAME, "messages": messages, "max_tokens": PERSON_TOKENS, "ignore_eos": True}
    started_s = time.monotonic()
    first_s = 0.0
    async with engine.stream_chat(payload) as events:
        async for event in events:
            if not first_s and event["choices"] and event["choices"][0]["delta"].get("content"):
                first_s = time.monotonic()
    return first_s - started_s, (PERSON_TOKENS - 1) / (time.monotonic() - first_s)


def _merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    asked = [one for result in results for one in result["asked"]]
    return {
        "first_token_s": statistics.median(first for first, _ in asked),
        "tokens_per_s": statistics.median(rate for _, rate in asked),
        "samples_per_s": statistics.median(result["samples_per_s"] for result in results),
        "n": len(asked),
    }
