"""Refill by the model, where it is good enough (`memory_refill`): held against what was said.

A version that has a word, a number or a name that its chunk does not have, or has lost a "not", is dropped, and the
extract stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.memory.context import Context, Kept, Message
from agent.memory.counting import Counter
from agent.memory.word_lists import NEGATIONS
from agent.memory.words import analyse
from infra.errors import EverloopError

MAX_AT_ONCE = 4  # chunks of one context; each costs a short answer of the engine
LEAST_RAW_TOKENS = 32  # a shorter one is as well cut
INSTRUCTION = "Write this message again in at most {words} words. Use only words that stand in it. Say no more.\n\n"
WORDS_PER_TOKEN = 0.7

Ask = Callable[[list[Message], int], Awaitable[str]]


def invented(version: str, raw: str) -> list[str]:
    """Return the words of a version that do not stand in what was said, and the negations that it lost."""
    new, old = analyse(version), analyse(raw)
    lost = (old.words & NEGATIONS) - new.words
    return sorted(set(new.stems) - set(old.stems)) + sorted((new.words & NEGATIONS) - old.words) + sorted(lost)


def worth_rewriting(context: Context) -> list[Kept]:
    """Return the chunks that were cut and are worth the model's time, the most important first."""
    cut = [
        kept
        for kept in context.kept
        if kept.num_tokens < kept.num_raw_tokens and kept.num_raw_tokens >= LEAST_RAW_TOKENS
    ]
    return sorted(cut, key=lambda kept: -kept.importance)[:MAX_AT_ONCE]


async def rewritten(context: Context, ask: Ask, counter: Counter) -> Context:
    """Return the context with the versions of the model that hold; it stays within its budget.

    Parameters
    ----------
    ask
        Has the model answer messages within a number of tokens; where it cannot, the extract stays.
    """
    chunks = worth_rewriting(context)

    async def version(kept: Kept) -> str:
        words = max(int(WORDS_PER_TOKEN * kept.num_tokens), 3)
        prompt = INSTRUCTION.format(words=words) + kept.chunk.text
        try:
            return (await ask([{"role": "user", "content": prompt}], kept.num_tokens)).strip()
        except EverloopError:
            return ""

    texts = await asyncio.gather(*(version(kept) for kept in chunks))
    held = {
        kept.index: text
        for kept, text in zip(chunks, texts, strict=True)
        if text and counter.text(text) <= kept.num_tokens and not invented(text, kept.chunk.text)
    }
    return context.with_texts(held) if held else context
