"""What the loop of tools costs: a step's own time, beside the engine's and the tool's."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np

from flows.bench.gateway import PARTS, null_engine_url
from flows.bench.stack import own_stack
from infra import report
from infra.settings import Settings

STEPS = 4
WARM_UP = 10


def measure(num_requests: int) -> dict[str, Any]:
    """Have answers of no step and of four in turn, one at a time, before an engine that answers at once.

    A step's own time is what an answer with steps takes more than one without, less the tools' own time and what
    the engine itself takes for as many generations, by the step.

    Returns
    -------
    dict
        ``step_added_p50_ms`` and ``step_added_p95_ms``, and what they were computed from.
    """
    with null_engine_url() as url, own_stack(PARTS, url) as (settings, _, _):
        return steps(settings, url, num_requests)


def steps(settings: Settings, url: str, num_requests: int) -> dict[str, Any]:
    """Do as :func:`measure`, on an API that is there, before an engine that answers at once at `url`."""
    plain, stepped, tools, engine = [], [], [], []
    with (
        httpx.Client(timeout=60.0, trust_env=False) as http,
        report.Phase("steps", num_requests) as phase,
    ):
        for number in range(WARM_UP + num_requests):
            took = [_ask(http, settings, number, steps) for steps in (0, STEPS)]
            engine_ms = _generate(http, url, number)
            if number < WARM_UP:
                continue
            plain.append(took[0][0])
            stepped.append(took[1][0])
            tools.append(took[1][1])
            engine.append(engine_ms)
            phase.advance()
    # Answers of one turn had the same machine. What the engine takes is least disturbed at its median.
    added = (np.array(stepped) - np.array(plain) - np.array(tools)) / STEPS - np.median(engine)
    p50, p95 = np.percentile(added, [50, 95])
    return {
        "n": num_requests,
        "steps": STEPS,
        "step_added_p50_ms": round(float(p50), 2),
        "step_added_p95_ms": round(float(p95), 2),
        "answer_p50_ms": round(float(np.median(plain)), 2),
        "answer_with_steps_p50_ms": round(float(np.median(stepped)), 2),
        "tool_p50_ms": round(float(np.median(tools)) / STEPS, 3),
        "engine_p50_ms": round(float(np.median(engine)), 2),
    }


def _ask(http: httpx.Client, settings: Settings, number: int, steps: int) -> tuple[float, float]:
    """Return how long an answer took, and its tools, in milliseconds; an answer of other steps is an error."""
    body = {
        "model": "everloop",
        "messages": [{"role": "user", "content": f"Do it in {steps} steps, number {number}."}],
        "user": f"user-{number}",
        "stream": True,
        "stream_options": {"include_steps": True},
        "server_tools": ["calculator"],
    }
    began_s = time.perf_counter()
    answer = http.post(
        f"{settings.need('public_url')}/v1/chat/completions", json=body, headers=settings.credentials
    ).raise_for_status()
    took_ms = 1000.0 * (time.perf_counter() - began_s)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    made = [
        call for chunk in chunks if "step" in chunk for call in chunk["step"]["calls"] if call["status"] == "ok"
    ]
    if len(made) != steps:
        raise AssertionError(f"{len(made)} calls were made, not {steps}: {answer.text[:500]}")
    return took_ms, sum(call["ms"] for call in made)


def _generate(http: httpx.Client, url: str, number: int) -> float:
    body = {"messages": [{"role": "user", "content": f"Number {number}."}], "stream": True}
    began_s = time.perf_counter()
    http.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return 1000.0 * (time.perf_counter() - began_s)
