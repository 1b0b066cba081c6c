"""The context of an answer within a hard budget: mask the past, allocate the budget, refill from the raw log.

After the idea of Memory Diffusion (Mind Lab): the trajectory itself is the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agent.memory import allocation
from agent.memory.counting import Counter
from agent.memory.importance import NAMES, Candidates, Chunk, Weights, features
from agent.memory.refill import GAP, Draft, draft, refill
from agent.memory.splitting import parts
from agent.memory.vectors import WordVectors
from agent.memory.words import analyse
from infra.errors import InvalidRequestError

Message = dict[str, Any]
LEAST_SHARE = 0.8  # of a chunk's words, in the shortest writing that is worth its place
LEAST_TOKENS = 6  # of a chunk that is worth its place
MOST_CHARS = 6.0  # a token has, on average


@dataclass(slots=True)
class Kept:
    """A chunk in the context: what is left of it, and why it is there."""

    chunk: Chunk
    text: str
    num_tokens: int
    num_raw_tokens: int
    importance: float
    features: dict[str, float] = field(default_factory=dict)
    index: int = 0
    by_model: bool = False

    def record(self) -> dict[str, Any]:
        """Return what an episode keeps of this; not its words, which are in the messages."""
        return {
            "turn": self.chunk.turn,
            "position": self.chunk.position,
            "role": self.chunk.role,
            "tokens": self.num_tokens,
            "of_tokens": self.num_raw_tokens,
            "importance": round(self.importance, 4),
            **({"by_model": True} if self.by_model else {}),
            "features": {name: round(value, 3) for name, value in self.features.items() if value},
        }


@dataclass(slots=True)
class Context:
    """What the model is to see.

    Parameters
    ----------
    budget, used
        Tokens; the template is among them, the answer is not. ``used`` never exceeds ``budget``.
    num_earlier
        Messages of before that could have been in it.
    is_whole
        Whether all of them are, word for word.
    """

    messages: list[Message]
    budget: int
    used: int
    num_earlier: int
    kept: list[Kept]
    is_whole: bool
    notes: list[str] = field(default_factory=list)
    builder: _Builder | None = None

    def with_texts(self, texts: Mapping[int, str]) -> Context:
        """Return the context with other texts for some chunks, by their index; as it is, if that is too long."""
        assert self.builder is not None
        all_texts = {kept.index: texts.get(kept.index, kept.text) for kept in self.kept}
        messages = self.builder.messages(all_texts)
        used = self.builder.counter.prompt(messages, self.builder.tools)
        if used > self.budget:
            return self
        kept = [
            replace(
                each,
                text=texts[each.index],
                num_tokens=self.builder.counter.text(texts[each.index]),
                by_model=True,
            )
            if each.index in texts
            else each
            for each in self.kept
        ]
        return replace(self, messages=messages, used=used, kept=kept)

    def record(self) -> dict[str, Any]:
        """Return what the episode keeps of how the context was made."""
        positions = {kept.chunk.position for kept in self.kept}
        return {
            "budget": self.budget,
            "used": self.used,
            "earlier": self.num_earlier,
            "kept": self.num_earlier if self.is_whole else len(positions),
            "dropped": 0 if self.is_whole else self.num_earlier - len(positions),
            "chunks": [kept.record() for kept in self.kept],
            **({"notes": self.notes} if self.notes else {}),
        }


def build(
    chunks: Sequence[Chunk],
    question: str | Sequence[Message],
    budget: int,
    weights: Weights,
    counter: Counter,
    *,
    vectors: WordVectors | None = None,
    system: Sequence[Message] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    num_earlier: int | None = None,
) -> Context:
    """Build a context of at most `budget` tokens.

    Parameters
    ----------
    chunks
        The messages of before, in order; long ones are split in here.
    question
        What is to be answered: the text of the user's message, or the messages from it on.
    vectors
        By which what was said in other words is found.
    system
        What always comes first.
    num_earlier
        How many messages there were, where `chunks` are only those that were worth looking at.

    Raises
    ------
    InvalidRequestError
        Code ``context_length_exceeded``, where not even the question fits.
    """
    last: list[Message] = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    total = len(chunks) if num_earlier is None else num_earlier
    if total == len(chunks) and _may_fit(chunks, budget, counter):
        raw = [*system, *({"role": chunk.role, "content": chunk.text} for chunk in chunks), *last]
        used = _count(counter, raw, tools)
        if used is not None and used <= budget:
            return Context(raw, budget, used, total, [], is_whole=True)
    fixed = counter.prompt([*system, *last], tools)
    if fixed > budget:
        raise too_long(fixed, budget)
    made = _Builder(chunks, last, budget, weights, counter, vectors, list(system), tools, fixed).build()
    made.num_earlier = total
    return made


def _may_fit(chunks: Sequence[Chunk], budget: int, counter: Counter) -> bool:
    """Tell whether it is worth counting all of it; where this is wrong, all of it is kept by the long way."""
    return sum(len(chunk.text) for chunk in chunks) / MOST_CHARS + counter.message_overhead * len(chunks) <= budget


def too_long(size: int, limit: int) -> InvalidRequestError:
    """Return the error for what does not fit."""
    return InvalidRequestError(
        f"This message and what must come with it are {size} tokens, {limit} fit. Send less, ask for a shorter "
        'answer (max_tokens), or send "truncation": "auto" to have the message cut.',
        code="context_length_exceeded",
        param="messages",
    )


def _count(counter: Counter, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> int | None:
    """Return the size of a prompt; None where the template does not take these messages in this order."""
    try:
        return counter.prompt(messages, tools)
    except InvalidRequestError:
        return None


class _Builder:
    """One context while it is built."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        last: list[Message],
        budget: int,
        weights: Weights,
        counter: Counter,
        vectors: WordVectors | None,
        system: list[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        fixed: int,
    ) -> None:
        self.chunks = [part for chunk in chunks for part in parts(chunk) if part.text.strip()]
        self.last, self.system, self.tools = last, system, tools
        self.budget, self.fixed = budget, fixed
        self.counter = counter
        self.overhead = counter.message_overhead
        question = str(last[0].get("content") or "")
        before = next((chunk.text for chunk in reversed(self.chunks) if chunk.role == "assistant"), "")
        self.candidates = Candidates.of(self.chunks)
        self.features = features(self.candidates, question, before, vectors)
        self.importance = np.exp(self.features @ weights.vector())
        self.wanted = frozenset(analyse(question).stems)
        self.drafts: dict[int, Draft] = {}

    def build(self) -> Context:
        free = self.budget - self.fixed
        # Hardly more of them can be kept than have room for a few words each.
        most = max(free // (self.overhead + LEAST_TOKENS), 1)
        order = [int(at) for at in np.argsort(-self.importance, kind="stable")[:most]]
        for at in order:
            self.drafts[at] = draft(
                self.chunks[at].text, self.counter, self.candidates.bag.rarity, self.wanted, LEAST_SHARE
            )
        written = {at: refill(self.drafts[at], share, self.counter) for at, share in self._shares(order, free)}
        texts = {at: text for at, (text, _) in written.items() if text}
        sizes = {at: size for at, (text, size) in written.items() if text}
        self._use_spare(order, texts, sizes, free)
        return self._fitted(texts, sizes)

    def _shares(self, order: Sequence[int], free: int) -> list[tuple[int, int]]:
        if not order:
            return []
        most = np.array([self.drafts[at].num_tokens for at in order], np.int64)
        least = np.array([self.drafts[at].shortest for at in order], np.int64)
        found = allocation.mask(self.importance[order], least, most, self.overhead, free)
        return [(at, int(share)) for at, share in zip(order, found, strict=True) if share]

    def _estimate(self, sizes: Mapping[int, int]) -> int:
        """Return what kept chunks cost; neighbours of one role share a message."""
        cost, role = 0, ""
        for at in sorted(sizes):
            cost += sizes[at] + (1 if self.chunks[at].role == role else self.overhead)
            role = self.chunks[at].role
        return cost

    def _use_spare(self, order: Sequence[int], texts: dict[int, str], sizes: dict[int, int], free: int) -> None:
        """Give what was left over to the next chunks, as short as they may be, then to those that are not whole."""
        spare = free - self._estimate(sizes)
        missing = [at for at in order if at not in sizes]
        for at in [*missing, *order]:
            if spare < 2:
                return
            drafted = self.drafts[at]
            if at in sizes:
                share = sizes[at] + spare
                if sizes[at] >= drafted.num_tokens:
                    continue
            else:
                share = drafted.shortest
                if share + self.overhead > spare:
                    continue
            text, size = refill(drafted, share, self.counter)
            if text:
                texts[at], sizes[at] = text, size
                spare = free - self._estimate(sizes)

    def _fitted(self, texts: dict[int, str], sizes: dict[int, int]) -> Context:
        """Count exactly; where tokens at the seams made it too long, the least important gives way."""
        while True:
            messages = self.messages(texts)
            used = self.counter.prompt(messages, self.tools)
            if used <= self.budget:
                return self._context(messages, used, texts, sizes)
            weakest = min(texts, key=lambda at: self.importance[at])
            share = min(sizes[weakest], self.drafts[weakest].num_tokens) - (used - self.budget)
            text, size = refill(self.drafts[weakest], share, self.counter) if share > 0 else ("", 0)
            if text and size < sizes[weakest]:
                texts[weakest], sizes[weakest] = text, size
            else:
                del texts[weakest], sizes[weakest]

    def messages(self, texts: Mapping[int, str]) -> list[Message]:
        """Return the chat of written chunks, between what comes first and the question."""
        merged: list[Message] = []
        for at in sorted(texts):
            role = self.chunks[at].role
            if merged and merged[-1]["role"] == role:
                merged[-1]["content"] += f"\n{texts[at]}"
            else:
                merged.append({"role": role, "content": texts[at]})
        if self.counter.must_alternate and merged:
            # Some templates want questions and answers in turn: what is missing is marked as left out.
            if merged[0]["role"] == "assistant":
                merged.insert(0, {"role": "user", "content": GAP})
            if merged[-1]["role"] == self.last[0]["role"] == "user":
                merged.append({"role": "assistant", "content": GAP})
        return [*self.system, *merged, *self.last]

    def _context(
        self, messages: list[Message], used: int, texts: Mapping[int, str], sizes: Mapping[int, int]
    ) -> Context:
        kept = [
            Kept(
                self.chunks[at],
                texts[at],
                sizes[at],
                self.drafts[at].num_tokens,
                float(self.importance[at]),
                dict(zip(NAMES, map(float, self.features[at]), strict=True)),
                at,
            )
            for at in sorted(texts)
        ]
        return Context(messages, self.budget, used, 0, kept, is_whole=False, builder=self)
