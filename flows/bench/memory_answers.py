"""Whether memory helps answers: a real engine is asked for what was planted, with contexts made in several ways."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from agent.memory.context import Message
from agent.memory.counting import Counter
from agent.memory.importance import Candidates, Chunk, defaults, features
from agent.memory.vectors import WordVectors, of_settings
from deploy.gates import wilson_interval
from flows.bench import memory_conversations
from flows.bench.memory import Case, _role, _take, content_words, fifo, ours
from flows.bench.stack import own_stack
from infra import report
from infra.settings import BASE_MODEL_NAME, Settings

ANSWER_TOKENS = 32
AT_ONCE = 8
ENOUGH = 0.5  # of the content words of what was planted, those of the question aside
ROUNDS = 2000  # of the bootstrap
FEW = 4
WAYS = ("memory", "whole_turns", "few_turns", "notes", "fifo", "evidence")


def answers(num: int, budget: int) -> dict[str, Any]:
    """Ask the base model, greedily, questions about what was said long before.

    Returns
    -------
    dict
        For each way the share of answers that have what was planted, with an interval of 95 % over questions.
        ``memory``: as the assistant does; ``whole_turns``: its most important turns, none shortened; ``few_turns``:
        four of these; ``notes``: those four in the system message; ``fifo``: the newest; ``evidence``: the planted
        turns alone, which no way can beat by much. And the differences of ``memory`` to the others, paired.
    """
    rows = memory_conversations.conversations("held_out", 16)
    pairs = [(row, question) for row in rows for question in row["questions"]]
    random.Random(0).shuffle(pairs)
    with own_stack({"postgres", "engine"}) as (settings, _, _):
        counter, vectors = Counter(settings.base_model_dir), of_settings(settings)
        cases = [Case(row["turns"], question, counter) for row, question in pairs[:num]]
        wanted = [question["answer"] for _, question in pairs[:num]]
        prompts = {way: [_prompt(way, case, budget, vectors) for case in cases] for way in WAYS}
        found = asyncio.run(_ask_all(settings, prompts))
    hits = {
        way: [_has(said, answer, case.question) for said, answer, case in zip(texts, wanted, cases, strict=True)]
        for way, texts in found.items()
    }
    result: dict[str, Any] = {"questions": len(cases), "budget": budget, "model": BASE_MODEL_NAME}
    for way, each in hits.items():
        recalled = [all(case.recalled(prompt)) for case, prompt in zip(cases, prompts[way], strict=True)]
        low, high = wilson_interval(sum(each), len(each))
        share = {"share": sum(each) / len(each), "low": low, "high": high, "recalled": float(np.mean(recalled))}
        result[way] = {name: round(value, 3) for name, value in share.items()}
    for other in WAYS[1:]:
        difference = np.array(hits["memory"], float) - np.array(hits[other], float)
        result[f"memory_over_{other}"] = _paired(difference)
    result["examples"] = [
        {"question": case.question, "wanted": wanted[at], **{way: found[way][at] for way in WAYS}}
        for at, case in enumerate(cases[:8])
    ]
    return result


def _prompt(way: str, case: Case, budget: int, vectors: WordVectors | None) -> list[Message]:
    weights = defaults(has_vectors=vectors is not None)
    if way == "memory":
        return ours(case, budget, weights, vectors)
    if way == "fifo":
        return fifo(case, budget)
    if way == "evidence":
        return _take(case, [at for at, turn in enumerate(case.turns) if turn in case.evidence], budget)
    chunks = [Chunk(_role(turn), turn["text"], turn["id"], at) for at, turn in enumerate(case.turns)]
    before = next((chunk.text for chunk in reversed(chunks) if chunk.role == "assistant"), "")
    importance = features(Candidates.of(chunks), case.question, before, vectors) @ weights.vector()
    order = np.argsort(-importance, kind="stable").tolist()
    if way == "whole_turns":
        return _take(case, order, budget)
    few = _take(case, order[:FEW], budget)
    return few if way == "few_turns" else _as_notes(few)


def _as_notes(messages: list[Message]) -> list[Message]:
    """Return what was said before as quotations, so that nobody goes on in its style."""
    who = {"user": "The user", "assistant": "You"}
    quoted = "\n".join(f'- {who[message["role"]]} said: "{message["content"]}"' for message in messages[:-1])
    return [{"role": "system", "content": f"Earlier in this conversation:\n{quoted}"}, messages[-1]]


async def _ask_all(settings: Settings, prompts: Mapping[str, Sequence[list[Message]]]) -> dict[str, list[str]]:
    """Ask for all answers, a few at once."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(client: httpx.AsyncClient, messages: list[Message]) -> str:
        body = {"model": BASE_MODEL_NAME, "messages": messages, "temperature": 0.0, "max_tokens": ANSWER_TOKENS}
        async with slots:
            response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    found = {}
    url, headers = settings.need("engine_url"), settings.engine_credentials
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300.0, trust_env=False) as client:
        for way, each in prompts.items():
            found[way] = list(await asyncio.gather(*(ask(client, messages) for messages in each)))
            report.say(f"{way}: {len(each)} answers")
    return found


def _has(said: str, planted: str, question: str) -> bool:
    """Tell whether an answer has what was planted; words of the question are no evidence."""
    wanted = content_words(planted) - content_words(question)
    return bool(wanted) and len(wanted & content_words(said)) >= ENOUGH * len(wanted)


def _paired(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Return a mean difference and its interval of 95 %, by a bootstrap over questions."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (ROUNDS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "difference": round(float(values.mean()), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }
