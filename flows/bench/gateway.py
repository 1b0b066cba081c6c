"""What the gateway costs: beside vLLM itself, and alone, before an engine that answers at once."""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sqlalchemy as sa

from feedback.tables import Episode
from flows.bench.load_generator import Measured, load
from flows.bench.stack import own_stack
from infra import report
from infra.settings import BASE_MODEL_NAME, Settings

NULL_CONNECTIONS = 32
NULL_USERS = 200
FIRST_TOKENS = 8
PARTS = frozenset({"postgres", "broker", "relay", "ledger", "reconciler", "api"})


def first_tokens(settings: Settings, num_requests: int) -> dict[str, Any]:
    """Ask vLLM and the gateway in turn, one request at a time; return what the gateway adds to the first token."""
    engine, gateway = settings.need("engine_url"), settings.need("public_url")
    found: dict[str, list[float]] = {engine: [], gateway: []}
    own: dict[str, dict[str, Any]] = {engine: {}, gateway: {"store": False}}  # a bench must teach nothing
    known = {engine: settings.engine_credentials, gateway: settings.credentials}
    with report.Phase("time to first token", 2 * num_requests) as phase:
        for number in range(num_requests + 2):
            for url, times in found.items():
                measured = asyncio.run(_one(url, number, own[url], known[url]))
                if number >= 2:  # the first warm up
                    times += measured.first_token_s
                    phase.advance()
    # Both of a turn had the same machine; a percentile of differences would be one of its noise.
    percentiles = {url: np.percentile(times, [50, 99]) * 1000.0 for url, times in found.items()}
    return {
        "n": num_requests,
        "engine_ttft_ms": [round(float(value), 2) for value in percentiles[engine]],
        "gateway_ttft_ms": [round(float(value), 2) for value in percentiles[gateway]],
        "ttft_added_p50_ms": round(float(percentiles[gateway][0] - percentiles[engine][0]), 2),
        "ttft_added_p99_ms": round(float(percentiles[gateway][1] - percentiles[engine][1]), 2),
    }


async def _one(url: str, number: int, own: dict[str, Any], headers: dict[str, str]) -> Measured:
    body = {
        "model": BASE_MODEL_NAME,
        "messages": [{"role": "user", "content": f"Say something about the number {number}."}],
        "max_tokens": FIRST_TOKENS,
        "seed": number,
        "stream": True,
        **own,
    }
    return await load(url, lambda _: body, num_connections=1, num_requests=1, headers=headers)


def null_engine(seconds: float) -> dict[str, Any]:
    """Send what the whole gateway takes, half of it streamed, before an engine that answers at once.

    Returns
    -------
    dict
        ``null_engine_rps`` (the second half of the time), latencies, and whether every answer is an episode.
    """
    with null_engine_url() as url, own_stack(PARTS, url) as (settings, sessions, _):
        gateway = settings.need("public_url")
        options: dict[str, Any] = {"num_connections": NULL_CONNECTIONS, "headers": settings.credentials}
        asyncio.run(load(gateway, _null_body, seconds=seconds / 2, **options))
        with sessions() as session:
            before = session.scalar(sa.select(sa.func.count()).select_from(Episode)) or 0
        measured = asyncio.run(load(gateway, _null_body, seconds=seconds, **options))
        with sessions() as session:
            episodes = (session.scalar(sa.select(sa.func.count()).select_from(Episode)) or 0) - before
    answered = len(measured.whole_s) - len(measured.failures)
    return {
        "null_engine_rps": round(answered / measured.seconds, 1),
        "n": answered,
        "failed": len(measured.failures),
        "failures": measured.failures[:3],
        "episodes_missing": answered - episodes,
        "p50_ms": round(1000 * statistics.median(measured.whole_s), 1),
        "p99_ms": round(1000 * float(np.percentile(measured.whole_s, 99)), 1),
    }


def _null_body(number: int) -> dict[str, Any]:
    content = f"Say something about the number {number}."
    return {
        "model": "everloop",
        "messages": [{"role": "user", "content": content}],
        "user": f"user-{number % NULL_USERS}",
        "max_tokens": 16,
        "stream": number % 2 == 0,
    }


@contextmanager
def null_engine_url() -> Iterator[str]:
    """Run an engine that answers at once for the length of the block; yield its address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "flows.bench.null_engine", str(port)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
