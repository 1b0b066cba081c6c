"""Rewards that no one can argue with: tasks whose answers a program checks.

A verifier makes tasks and judges answers to them. The built-in ones are modules of :mod:`trainer.verifiers`; others
come from installed packages, as entry points of the group ``everloop.verifiers``. Both are run in a process of
their own: one that raises, hangs or answers nonsense is counted, and costs a run nothing but its task.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import math
import pkgutil
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

from infra.errors import EverloopError, InvalidRequestError
from trainer import verifiers
from trainer.config import nearest

log = logging.getLogger("everloop.verify")

ENTRY_POINTS = "everloop.verifiers"
JUDGING_PART = 3  # of so many tasks one judges
MAX_DRAWS = 32
OPENING_TIMEOUT_S = 120.0  # what verifiers import takes 10 s on a busy machine


@dataclass(frozen=True, slots=True)
class Task:
    """A task whose answer can be checked.

    Attributes
    ----------
    skill
        What it takes, such as ``reasoning/chain_sum``; results are reported by skill.
    messages
        What the assistant is asked.
    key
        What the verifier needs to judge an answer; plain data.
    """

    skill: str
    messages: list[dict[str, Any]]
    key: dict[str, Any] = field(default_factory=dict)


class Verifier(ABC):
    """Makes tasks, and judges answers to them.

    Attributes
    ----------
    skills
        What its tasks take, each a word; the verifier's name is put before it.
    """

    skills: Sequence[str]

    def warm_up(self) -> None:  # noqa: B027
        """Import and read what takes long: a process does so before the time of its first task runs."""

    @abstractmethod
    def task(self, skill: str, seed: int) -> tuple[str, dict[str, Any]]:
        """Return (what is asked, what is needed to judge an answer); the same for the same seed."""

    @abstractmethod
    def judge(self, skill: str, key: dict[str, Any], answer: str) -> float:
        """Return how right an answer is, from 0 to 1."""


def names() -> list[str]:
    """Return the names of all verifiers, built in and installed."""
    built_in = {module.name for module in pkgutil.iter_modules(verifiers.__path__)}
    return sorted(built_in | {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def check_names(wanted: Sequence[str]) -> None:
    """Refuse names of verifiers that there are not.

    Raises
    ------
    InvalidRequestError
        Code ``verifier_unknown``.
    """
    for name in wanted:
        if name not in names():
            raise InvalidRequestError(
                f"There is no verifier {name!r}. {nearest(name, names())}", code="verifier_unknown"
            )


def open_verifier(name: str) -> Verifier:
    """Return a verifier."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        found: Verifier = entry.load()()
        return found
    built_in: Verifier = importlib.import_module(f"trainer.verifiers.{name}").VERIFIER
    return built_in


class Verification:
    """Runs verifiers in a process of their own.

    Parameters
    ----------
    verifier_names
        Those that may be asked.
    timeout_s
        Longest time for one task or one judgement; what takes longer is killed.

    Attributes
    ----------
    faults
        What went wrong, counted: ``verifier_failed``, ``verifier_timed_out``, ``verifier_not_a_score``,
        ``no_task_of_this_part``.
    """

    def __init__(self, verifier_names: Sequence[str], timeout_s: float) -> None:
        self.verifier_names = list(verifier_names)
        self.timeout_s = timeout_s
        self.faults: Counter[str] = Counter()
        # It begins with the first task. A process imports what verifiers need before its first task's time runs, as
        # does the one that takes the place of a process that was killed.
        self._pool = ProcessPool(
            1, initializer=_warm_up, initargs=[self.verifier_names], context=get_context("spawn")
        )

    def close(self) -> None:
        """End the process."""
        self._pool.stop()
        self._pool.join()

    def pop_faults(self) -> Counter[str]:
        """Return what went wrong since the last call."""
        faults, self.faults = self.faults, Counter()
        return faults

    def training_tasks(self, num_tasks: int, seed: int) -> list[Task]:
        """Return tasks to train on, the skills in turn; the same for the same seed.

        Those that fail are left out.
        """
        skills = self._skills() if num_tasks else []
        wanted = [skills[number % len(skills)] for number in range(num_tasks)] if skills else []
        return self._make(wanted, seed, judges=False)

    def judging_tasks(self, per_skill: int, seed: int) -> list[Task]:
        """Return `per_skill` tasks of each skill to judge by, likewise; none of them ever trains."""
        return self._make(self._skills() * per_skill, seed, judges=True) if per_skill else []

    def _skills(self) -> list[str]:
        return [skill for found in self._run(_skills_of, self.verifier_names) if found for skill in found]

    def _make(self, wanted: Sequence[str], seed: int, *, judges: bool) -> list[Task]:
        """Draw tasks until each is of the wanted part; those of which no draw was are counted and left out."""
        found: dict[int, Task] = {}
        left = list(enumerate(wanted))
        for draw in range(MAX_DRAWS):
            if not left:
                break
            drawn = list(self._run(_make, [(skill, _seed(skill, seed, number) + draw) for number, skill in left]))
            made = {number: task for (number, _), task in zip(left, drawn, strict=True) if task is not None}
            fitting = {number: task for number, task in made.items() if is_judging(task) == judges}
            found |= fitting
            left = [(number, skill) for number, skill in left if number in made and number not in fitting]
        if left:
            self.faults["no_task_of_this_part"] += len(left)
        return [found[number] for number in sorted(found)]

    def judge(self, tasks: Sequence[Task], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """Return how right each answer to each task is, from 0 to 1; None where the verifier could not tell."""
        flat = [(task, answer) for task, group in zip(tasks, answers, strict=True) for answer in group]
        scores = self._scores(flat)
        return [[next(scores) for _ in group] for group in answers]

    def _scores(self, judged: Sequence[tuple[Task, str]]) -> Iterator[float | None]:
        for score in self._run(_judge, judged):
            if score is not None and not (math.isfinite(score) and 0.0 <= score <= 1.0):
                self.faults["verifier_not_a_score"] += 1
                score = None
            yield score

    def _run(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
        """Yield what `function` returns for each argument, None where it failed.

        Raises
        ------
        EverloopError
            Code ``verifier_hangs``: the process cannot begin, as one of them does not come back from being opened.
        """
        futures = [self._pool.schedule(function, [one], timeout=self.timeout_s) for one in arguments]
        for future in futures:
            try:
                yield future.result(self.timeout_s + OPENING_TIMEOUT_S)
            except TimeoutError:
                if not future.done():
                    raise EverloopError(
                        f"A verifier hangs when it is opened. Leave it out of `verifiers`: {self.verifier_names}.",
                        code="verifier_hangs",
                    ) from None
                self.faults["verifier_timed_out"] += 1
                yield None
            except Exception as error:
                self.faults["verifier_failed"] += 1
                log.warning("a verifier failed: %s", type(error).__name__)
                yield None


def _seed(skill: str, seed: int, number: int) -> int:
    return zlib.crc32(f"{skill}:{seed}:{number}".encode()) % 1_000_000_007


def _warm_up(verifier_names: Sequence[str]) -> None:
    for name in verifier_names:
        try:
            open_verifier(name).warm_up()
        except Exception:  # said and counted where it is used
            log.exception("the verifier %s cannot be opened", name)


def _skills_of(name: str) -> list[str]:
    return [f"{name}/{skill}" for skill in open_verifier(name).skills]


def is_judging(task: Task) -> bool:
    """Tell whether a task is one of those that judge, by what is asked alone: it never trains."""
    return zlib.crc32(json.dumps(task.messages).encode()) % JUDGING_PART == 0


def _make(wanted: tuple[str, int]) -> Task:
    skill, seed = wanted
    name, _, own = skill.partition("/")
    question, key = open_verifier(name).task(own, seed)
    return Task(skill, [{"role": "user", "content": question}], key)


def _judge(judged: tuple[Task, str]) -> float:
    task, answer = judged
    name, _, own = task.skill.partition("/")
    return float(open_verifier(name).judge(own, task.key, answer))
