"""How much of what was said before, and is asked for now, is in the context; beside simpler ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.memory.context import Message, build
from agent.memory.counting import Counter
from agent.memory.importance import K1, B, Chunk, Weights, defaults
from agent.memory.vectors import WordVectors, of_settings
from flows.bench import memory_conversations
from flows.bench.memory_time import build_ms
from infra.errors import InvalidRequestError
from infra.settings import Settings
from infra.stack import embedded
from reward.embedding import Embedder
from reward.embedding_wire import MAX_TEXT_CHARS

BUDGETS = (256, 512, 1024)
ENOUGH = 0.6  # of the content words of a turn
BASELINES = ("fifo", "bm25", "uniform")
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
# Of its own, so that the builder is not judged by the list that it was made with.
FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "but",
        "if",
        "of",
        "at",
        "by",
        "for",
        "with",
        "about",
        "to",
        "from",
        "in",
        "on",
        "is",
        "am",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "have",
        "has",
        "had",
        "do",
        "does",
        "did",
        "i",
        "me",
        "my",
        "you",
        "your",
        "he",
        "him",
        "his",
        "she",
        "her",
        "it",
        "its",
        "we",
        "us",
        "our",
        "they",
        "them",
        "their",
        "this",
        "that",
        "these",
        "those",
        "what",
        "which",
        "who",
        "whom",
        "when",
        "where",
        "why",
        "how",
        "not",
        "no",
        "so",
        "than",
        "then",
        "there",
        "here",
        "as",
        "can",
        "could",
        "will",
        "would",
        "should",
        "just",
        "very",
        "too",
        "also",
    ]
)
Method = Callable[["Case", int], list[Message]]


def content_words(text: str) -> set[str]:
    """Return the different words of a text that are no function words."""
    return {word for word in _WORD.findall(text.lower()) if word not in FUNCTION_WORDS}


class Case:
    """A conversation with one question about it."""

    def __init__(self, turns: list[dict[str, Any]], question: dict[str, Any], counter: Counter) -> None:
        self.turns = turns
        self.question = question["question"]
        self.evidence = [turn for turn in turns if turn["id"] in set(question["evidence"])]
        self.counter = counter

    @property
    def asked(self) -> Message:
        """The question as a message."""
        return {"role": "user", "content": self.question}

    def prompt(self, texts: dict[int, str]) -> list[Message]:
        """Return the chat of chosen turns, in their order, and the question."""
        chosen = [{"role": _role(self.turns[at]), "content": texts[at]} for at in sorted(texts)]
        return [*chosen, self.asked]

    def size(self, texts: dict[int, str]) -> int:
        """Return the tokens of that chat, template and all."""
        return self.counter.prompt(self.prompt(texts))

    def recalled(self, messages: Sequence[Message]) -> list[bool]:
        """Tell of each evidence turn whether enough of it is in a context; the question does not count."""
        there = content_words("\n".join(str(message["content"]) for message in messages[:-1]))
        found = []
        for turn in self.evidence:
            wanted = content_words(turn["text"])
            found.append(not wanted or len(wanted & there) >= ENOUGH * len(wanted))
        return found


class Read:
    """Texts as the sentence encoder reads them, each once."""

    def __init__(self, settings: Settings, conversations: Sequence[dict[str, Any]]) -> None:
        turns = [turn["text"] for row in conversations for turn in row["turns"]]
        asked = [question["question"] for row in conversations for question in row["questions"]]
        encoder = Embedder(settings, num_threads=2).load()
        texts = list(dict.fromkeys(text[:MAX_TEXT_CHARS] for text in [*turns, *asked] if text.strip()))
        self._rows = dict(zip(texts, encoder.embedded(texts), strict=True))

    def nearness(self, question: str, texts: Sequence[str]) -> list[float | None]:
        """Return how near texts are to a question (cosine)."""
        asked = self._rows.get(question[:MAX_TEXT_CHARS])
        rows = [self._rows.get(text[:MAX_TEXT_CHARS]) for text in texts]
        return [None if asked is None or row is None else float(row @ asked) for row in rows]


def _role(turn: dict[str, Any]) -> str:
    return "assistant" if turn["role"] in ("assistant", "bot", "system") else "user"


def _take(case: Case, order: Sequence[int], budget: int) -> list[Message]:
    """Take turns in an order for as long as they fit; one that does not is passed over."""
    texts: dict[int, str] = {}
    used = case.size({})
    for at in order:
        cost = case.counter.message_overhead + case.counter.text(case.turns[at]["text"])
        if used + cost > budget:
            continue
        trial = {**texts, at: case.turns[at]["text"]}
        if (size := case.size(trial)) <= budget:
            texts, used = trial, size
    return case.prompt(texts)


def fifo(case: Case, budget: int) -> list[Message]:
    """Return the newest turns that fit, the first of them cut where it must be."""
    texts: dict[int, str] = {}
    for at in range(len(case.turns) - 1, -1, -1):
        trial = {**texts, at: case.turns[at]["text"]}
        if case.size(trial) > budget:
            break
        texts = trial
    return case.prompt(texts)


def bm25(case: Case, budget: int) -> list[Message]:
    """Return the turns that score best, for as long as they fit."""
    bags = [re.findall(r"\w+", turn["text"].lower()) for turn in case.turns]
    mean = sum(map(len, bags)) / len(bags) or 1.0
    scores = np.zeros(len(bags))
    for term in set(re.findall(r"\w+", case.question.lower())):
        counts = np.array([bag.count(term) for bag in bags], float)
        found = int((counts > 0).sum())
        idf = np.log(1.0 + (len(bags) - found + 0.5) / (found + 0.5))
        norm = K1 * (1.0 - B + B * np.array([len(bag) for bag in bags]) / mean)
        scores += idf * counts * (K1 + 1.0) / (counts + norm)
    newest_first = np.arange(len(bags))[::-1]
    return _take(case, newest_first[np.argsort(-scores[::-1], kind="stable")].tolist(), budget)


def uniform(case: Case, budget: int) -> list[Message]:
    """Return the beginning of each turn, as many tokens of each; of the newest turns, where all are too many."""
    free = budget - case.size({})
    num = min(len(case.turns), max(free // (case.counter.message_overhead + 4), 1))
    chosen = range(len(case.turns) - num, len(case.turns))
    best: list[Message] = case.prompt({})
    low, high = 1, budget
    while low <= high:
        share = (low + high) // 2
        trial = {at: text for at in chosen if (text := case.counter.cut(case.turns[at]["text"], share))}
        if case.size(trial) <= budget:
            best, low = case.prompt(trial), share + 1
        else:
            high = share - 1
    return best


def ours(
    case: Case, budget: int, weights: Weights, vectors: WordVectors | None, read: Read | None = None
) -> list[Message]:
    """Return what the assistant would see."""
    near = read.nearness(case.question, [turn["text"] for turn in case.turns]) if read else [None] * len(case.turns)
    chunks = [
        Chunk(_role(turn), turn["text"], turn["id"], at, nearness=near[at]) for at, turn in enumerate(case.turns)
    ]
    return build(chunks, case.question, budget, weights, case.counter, vectors=vectors).messages


def recall(
    conversations: Sequence[dict[str, Any]],
    counter: Counter,
    vectors: WordVectors | None,
    weights: Weights,
    methods: Sequence[str] = BASELINES,
    read: Read | None = None,
) -> dict[str, Any]:
    """Measure all ways on all questions.

    Returns
    -------
    dict
        ``recall_256``, ``fifo_256`` and so on, ``best_baseline_256``, ``ratio_256``, and ``over_budget``: the
        contexts of ours that were longer than their budget, counted on the whole prompt.
    """
    known = {"fifo": fifo, "bm25": bm25, "uniform": uniform}
    ways: dict[str, Method] = {name: known[name] for name in methods}
    ways["recall"] = lambda case, budget: ours(case, budget, weights, vectors, read)
    cases = [
        Case(conversation["turns"], question, counter)
        for conversation in conversations
        for question in conversation["questions"]
    ]
    result: dict[str, Any] = {"conversations": len(conversations), "questions": len(cases)}
    result["evidence_turns"] = sum(len(case.evidence) for case in cases)
    over = 0
    for budget in BUDGETS:
        for name, way in ways.items():
            found: list[bool] = []
            for case in cases:
                messages = way(case, budget)
                over += name == "recall" and counter.prompt(messages) > budget
                found += case.recalled(messages)
            result[f"{name}_{budget}"] = round(sum(found) / max(len(found), 1), 4)
        if methods:
            best = max(result[f"{name}_{budget}"] for name in methods)
            result[f"best_baseline_{budget}"] = best
            result[f"ratio_{budget}"] = round(result[f"recall_{budget}"] / best, 3) if best else None
    return {**result, "over_budget": over}


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of conversations.

    Raises
    ------
    InvalidRequestError
        Code ``conversations_invalid``, with what is wrong.
    """
    try:
        data = json.loads(path.read_text())
        rows = data["conversations"] if isinstance(data, dict) else data
        for row in rows:
            ids = {turn["id"] for turn in row["turns"] if isinstance(turn["text"], str) and turn["role"]}
            for question in row["questions"]:
                if not isinstance(question["question"], str) or not set(question["evidence"]) <= ids:
                    raise ValueError(f"question {question['question']!r} names evidence that is no turn")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{path} is no file of conversations ({type(error).__name__}: {error}). It is a JSON list of "
            '{"turns": [{"id", "role", "text"}], "questions": [{"question", "evidence": [ids], "answer"}]}.',
            code="conversations_invalid",
        ) from error
    return list(rows)


def measure(
    settings: Settings, path: Path | None, which: str, num: int, *, with_times: bool = True, encoder: bool = False
) -> dict[str, Any]:
    """Measure recall and time; the conversations are those of a file, or our own."""
    settings = settings.model_copy(update={"memory_encoder": "sentence" if encoder else "off"})
    if path is None and which not in ("tune", "held_out"):
        raise InvalidRequestError(f"There is no set {which!r}: use held_out or tune.", code="set_unknown")
    rows = (
        read(path) if path else memory_conversations.conversations("tune" if which == "tune" else "held_out", num)
    )
    if settings.base_model is None and not settings.base_model_dir.exists():
        embedded.prepare_base_model(settings)
    counter, vectors = Counter(settings.base_model_dir), of_settings(settings)
    result = {"file": path.name if path else which, "vectors": vectors is not None, "encoder": encoder}
    weights = defaults(has_vectors=vectors is not None, has_sentences=encoder)
    result |= recall(rows, counter, vectors, weights, read=Read(settings, rows) if encoder else None)
    if with_times:
        texts = [turn["text"] for row in rows for turn in row["turns"] if turn["text"].strip()]
        questions = [question["question"] for row in rows for question in row["questions"]]
        result |= build_ms(settings, texts, questions or ["What did I say?"])
    return result
