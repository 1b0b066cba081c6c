"""What a model can do, by skill: tasks are put to it as it is served, and verifiers judge its answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from trainer.rollout import Sample
from trainer.verify import Task, Verification

Ask = Callable[[list[list[dict[str, Any]]]], list[list[Sample]]]


def measure(verification: Verification, tasks: Sequence[Task], ask: Ask) -> dict[str, list[float]]:
    """Return for each skill how right the answers to its tasks are, from 0 to 1.

    Parameters
    ----------
    ask
        Returns answers of a model to prompts. A task that it was refused, or whose answer the verifier could not
        judge, says nothing.
    """
    answers = ask([task.messages for task in tasks])
    verdicts = verification.judge(tasks, [[sample.text for sample in group] for group in answers])
    found: dict[str, list[float]] = defaultdict(list)
    for task, group in zip(tasks, verdicts, strict=True):
        found[task.skill] += [verdict for verdict in group if verdict is not None]
    return dict(found)


def table(scores: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the mean and the number of answers for each skill."""
    return {
        skill: {"rate": sum(given) / len(given), "n": len(given)}
        for skill, given in sorted(scores.items())
        if given
    }
