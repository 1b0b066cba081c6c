"""Rows of answers: comparisons that people made, and best against worst of fresh samples."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from reward.style import num_words
from trainer.recipe import Messages, Row, Rows
from trainer.rollout import Sample
from trainer.snapshot import Example
from trainer.verify import Task

LEAST_RIGHT = 0.5  # of verifiers that know more than right and wrong


def answer_of(messages: Messages, answer: str, name: str) -> Row:
    """Return a row with a prompt and one answer under `name`."""
    return {"prompt": messages, name: [{"role": "assistant", "content": answer}]}


def pair_of(messages: Messages, chosen: str, rejected: str) -> Row:
    """Return a row with two answers to one prompt, the first preferred."""
    return answer_of(messages, chosen, "chosen") | answer_of(messages, rejected, "rejected")


def compared(examples: Sequence[Example]) -> Rows:
    """Return all comparisons, those that say most last: liked against disliked, preferences, corrections."""
    contrasts, preferences = Rows(), Rows()
    by_prompt: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[json.dumps(example.messages)].append(example)
        for other in example.preferred_over:
            if other.strip() != example.answer.strip():
                preferences.add("preferences", pair_of(example.messages, example.answer, other))
    for group in by_prompt.values():
        liked = [example for example in group if example.balance > 0]
        disliked = [example for example in group if example.balance < 0]
        # The first against the first and so on: no popular prompt outweighs the rest.
        for good, bad in zip(liked, disliked, strict=False):
            if good.answer.strip() != bad.answer.strip():
                contrasts.add("contrasts", pair_of(good.messages, good.answer, bad.answer))
    return contrasts.then(preferences).then(corrections(examples))


def corrections(examples: Sequence[Example]) -> Rows:
    """Pair corrections with the answers that they correct."""
    found = Rows()
    for example in examples:
        for text in example.corrections:
            if text.strip() == example.answer.strip():
                found.set_aside["correction_changes_nothing"] += 1
            else:
                found.add("corrections", pair_of(example.messages, text, example.answer))
    return found


def demonstrations(examples: Sequence[Example], *, liked: bool) -> Rows:
    """Return answers as people want them, under ``answer``: corrections and, where `liked`, what they liked."""
    found = Rows()
    for example in examples:
        for text in example.corrections:
            found.add("corrections", {"prompt": example.messages, "answer": text})
        if example.corrections:
            continue
        if liked and (example.balance > 0 or example.preferred_over):
            found.add("liked", {"prompt": example.messages, "answer": example.answer})
        else:
            found.set_aside["no_demonstration"] += 1
    return found


def best_of(
    prompts: Sequence[Messages],
    samples: Sequence[Sequence[Sample]],
    rewards: Sequence[Sequence[float]],
    *,
    min_margin: float,
    least_reward: float,
    words_range: tuple[int, int],
) -> Rows:
    """Return the best sample of each prompt as a demonstration, those that stand out most last.

    The best is chosen as in :func:`best_against_worst`, must be better than the mean of its prompt by `min_margin`,
    and must have `least_reward`.
    """
    found = list[tuple[float, Row]]()
    set_aside = Counter[str]()
    for messages, group, scores in zip(prompts, samples, rewards, strict=True):
        best = _best(group, scores, words_range, set_aside)
        if best is None:
            continue
        margin = scores[best] - statistics.fmean(scores)
        if margin < min_margin:
            set_aside["margin_too_small"] += 1
            continue
        if scores[best] < least_reward:
            set_aside["worse_than_corrections"] += 1
            continue
        found.append((margin, {"prompt": messages, "answer": group[best].text}))
    found.sort(key=itemgetter(0))
    return Rows([row for _, row in found], ["samples"] * len(found), set_aside)


def best_against_worst(
    prompts: Sequence[list[dict[str, Any]]],
    samples: Sequence[Sequence[Sample]],
    rewards: Sequence[Sequence[float]],
    *,
    min_margin: float,
    words_range: tuple[int, int],
) -> Rows:
    """Pair the best sample of each prompt with its worst.

    The best must have ended by itself, and its length must lie in `words_range`: otherwise the policy
    drifts to whatever length the reward extrapolates best.
    """
    found = Rows()
    for messages, group, scores in zip(prompts, samples, rewards, strict=True):
        best = _best(group, scores, words_range, found.set_aside)
        if best is None:
            continue
        worst = min(range(len(group)), key=lambda i: scores[i])
        if scores[best] - scores[worst] < min_margin or group[best].text == group[worst].text:
            found.set_aside["margin_too_small"] += 1
            continue
        found.add("samples", pair_of(messages, group[best].text, group[worst].text))
    return found


def _best(
    group: Sequence[Sample], scores: Sequence[float], words_range: tuple[int, int], set_aside: Counter[str]
) -> int | None:
    """Return the place of the best sample that ended by itself within a range of lengths; None is counted."""
    if not group or not all(map(math.isfinite, scores)):
        set_aside["reward_not_finite" if group else "prompt_refused"] += 1
        return None
    low, high = words_range
    allowed = [
        i for i, one in enumerate(group) if one.finish_reason == "stop" and low <= num_words(one.text) <= high
    ]
    if not allowed:
        set_aside["no_sample_of_allowed_length"] += 1
        return None
    return max(allowed, key=lambda i: scores[i])


def right_ones(
    tasks: Sequence[Task], samples: Sequence[Sequence[Sample]], verdicts: Sequence[Sequence[float | None]]
) -> Rows:
    """Return the best answer to each task as a demonstration, where it ended by itself and is right.

    What is always right is among them: by imitating people a model unlearns what it does not rehearse.
    """
    found = Rows()
    for task, group, scores in zip(tasks, samples, verdicts, strict=True):
        told = [(score, sample) for score, sample in zip(scores, group, strict=True) if score is not None]
        right = [(s, one.text) for s, one in told if s >= LEAST_RIGHT and one.finish_reason == "stop"]
        if right:
            found.add("tasks", {"prompt": task.messages, "answer": max(right, key=itemgetter(0))[1]})
        else:
            found.set_aside["task_not_solved" if told else _unjudged(group)] += 1
    return found


def right_against_wrong(
    tasks: Sequence[Task], samples: Sequence[Sequence[Sample]], verdicts: Sequence[Sequence[float | None]]
) -> Rows:
    """Pair the best answer to each task with its worst, where the verifier finds one better than the other."""
    found = Rows()
    for task, group, scores in zip(tasks, samples, verdicts, strict=True):
        told = [(score, sample.text) for score, sample in zip(scores, group, strict=True) if score is not None]
        if not told:
            found.set_aside[_unjudged(group)] += 1
            continue
        best, worst = max(told, key=itemgetter(0)), min(told, key=itemgetter(0))
        if best[0] == worst[0]:
            found.set_aside["task_all_right" if best[0] > 0 else "task_all_wrong"] += 1
            continue
        found.add("tasks", pair_of(task.messages, best[1], worst[1]))
    return found


def _unjudged(group: Sequence[Sample]) -> str:
    return "task_not_judged" if group else "prompt_refused"
