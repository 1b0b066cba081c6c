"""``everloop bench serving``: the base model, an adapter, and the gateway, side by side in one run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from deploy import head
from deploy.tables import Release
from infra import report
from infra.db import connect
from infra.settings import BASE_MODEL_NAME, Settings

NUM_STREAMS = 16
ANSWER_TOKENS = 64


def serving(settings: Settings, runs: int) -> dict[str, Any]:
    """Return tokens per second of each variant and their ratios within the same run.

    The adapter's variant needs a champion or challenger that is one; it is left out before the first night.
    """
    sessions = connect(settings.need("database_url"), pool_size=1)
    with sessions() as session:
        current = head.read(session)
        names = [n for n in (current.champion, current.challenger) if n and n != BASE_MODEL_NAME]
        adapters = [r.name for r in session.query(Release).filter(Release.name.in_(names))]
    engine, gateway = settings.need("engine_url"), settings.need("public_url")
    variants: dict[str, Callable[[], Awaitable[float]]] = {
        "engine, base": lambda: _tokens_per_s(engine, BASE_MODEL_NAME),
        "gateway, base": lambda: _tokens_per_s(gateway, BASE_MODEL_NAME, learnable=True),
    }
    if adapters:
        variants["engine, adapter"] = lambda: _tokens_per_s(engine, adapters[0])
    figures = asyncio.run(_interleave(variants, runs))
    result: dict[str, Any] = {"streams": NUM_STREAMS, "runs": runs, "variants": {}}
    for name, values in figures.items():
        ratios = [value / base for value, base in zip(values, figures["engine, base"], strict=True)]
        compared = None if name == "engine, base" else "engine, base"
        result["variants"][name] = {
            "tokens_per_s": statistics.median(values),
            "ratio": statistics.median(ratios),
            "of": compared,
            "runs": [round(v) for v in values],
        }
    result["gateway_ratio"] = result["variants"]["gateway, base"]["ratio"]
    result["lora1_ratio"] = result["variants"]["engine, adapter"]["ratio"] if adapters else None
    return result


async def _interleave(variants: dict[str, Callable[[], Awaitable[float]]], runs: int) -> dict[str, list[float]]:
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


async def _tokens_per_s(url: str, model: str, *, learnable: bool = False) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:

        async def one(number: int) -> int:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell me the whole story of the number {number}."}],
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0.8,
                "seed": number,
            }
            if learnable:
                body["store"] = False  # a bench must teach nothing
            response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            return int(response.json()["usage"]["completion_tokens"])

        started_s = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(i) for i in range(NUM_STREAMS))))
        return tokens / (time.perf_counter() - started_s)
