"""Preference pairs: best against worst of fresh samples, and corrections against what they correct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reward.style import num_words
from trainer.rollout import Sample
from trainer.snapshot import Example


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    messages: list[dict[str, Any]]
    chosen: str
    rejected: str
    source: str


@dataclass(slots=True)
class PairSet:
    """Pairs, and what was set aside on the way, by reason."""

    pairs: list[Pair] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)


def best_against_worst(
    prompts: Sequence[list[dict[str, Any]]],
    samples: Sequence[Sequence[Sample]],
    rewards: Sequence[Sequence[float]],
    *,
    min_margin: float,
    words_range: tuple[int, int],
) -> PairSet:
    """Pair the best sample of each prompt with its worst.

    The best must have ended by itself, and its length must lie in `words_range`: otherwise the policy
    drifts to whatever length the reward extrapolates best.
    """
    result = PairSet()
    for messages, group, scores in zip(prompts, samples, rewards, strict=True):
        allowed = [i for i, s in enumerate(group) if s.finish_reason == "stop" and _within(s.text, words_range)]
        if not allowed:
            result.set_aside["no_sample_of_allowed_length"] += 1
            continue
        best = max(allowed, key=lambda i: scores[i])
        worst = min(range(len(group)), key=lambda i: scores[i])
        if scores[best] - scores[worst] < min_margin or group[best].text == group[worst].text:
            result.set_aside["margin_too_small"] += 1
            continue
        result.pairs.append(Pair(messages, group[best].text, group[worst].text, "samples"))
    return result


def corrections(examples: Sequence[Example], limit: int) -> PairSet:
    """Pair the newest corrections with the answers that they correct."""
    result = PairSet()
    pairs = [
        Pair(e.messages, text, e.answer, "correction")
        for e in examples
        for text in e.corrections
        if text.strip() != e.answer.strip()
    ]
    result.pairs = pairs[-limit:] if limit else []
    if len(pairs) > limit:
        result.set_aside["older_corrections"] = len(pairs) - limit
    return result


def _within(text: str, words_range: tuple[int, int]) -> bool:
    return words_range[0] <= num_words(text) <= words_range[1]
