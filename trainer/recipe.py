"""What a recipe is: the rows that it trains on, and TRL's trainer for them. The rest of a run is shared.

A recipe is one module of :mod:`trainer.recipes`, named as it is (``online_dpo`` is ``online-dpo``), with an object
``RECIPE``. Nothing else has to know of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pkgutil
import random
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from infra.errors import EverloopError, InvalidRequestError
from trainer import recipes, verify
from trainer.config import DEFAULT_RECIPE, RunConfig, nearest
from trainer.policy import ServedPolicy
from trainer.rollout import Sample
from trainer.snapshot import Example, Snapshot
from trainer.verify import Task

C = TypeVar("C", bound=RunConfig)
Messages = list[dict[str, Any]]
Row = dict[str, Any]

MIN_ROWS = 8
# With less, samples are as good as each other to the reward (arXiv 2503.15477: low variance, slow learning).
MIN_SPREAD = 0.01


class UnusableDataError(EverloopError):
    """There is nothing to train on: a reason to hold the run, and none to call it failed.

    Parameters
    ----------
    set_aside
        What was left out until then, by reason: it tells why.
    """

    status = 409

    def __init__(self, message: str, *, code: str, set_aside: Mapping[str, int] | None = None) -> None:
        super().__init__(message, code=code)
        self.set_aside = set_aside or {}


@dataclass(frozen=True, slots=True)
class Material:
    """What rows are made from.

    Attributes
    ----------
    data
        The frozen dataset.
    sample
        Returns fresh answers of the assistant as it is served: ``sample(prompts, num_samples)``, a list for each
        prompt.
    score
        Returns rewards, pessimistic and against reference answers: ``score(prompts, answers, references)``.
    tasks
        Returns tasks that can be checked, as many as asked for.
    verify
        Returns how right answers to tasks are, from 0 to 1, None where that cannot be told:
        ``verify(tasks, answers)``.
    words_range
        Lengths of answers, in words, that the policy is led to.
    policy
        Serves versions of the adapter while it trains; None where there is no engine.
    """

    data: Snapshot
    sample: Callable[[Sequence[Messages], int], list[list[Sample]]]
    score: Callable[[Sequence[Messages], Sequence[Sequence[str]], Sequence[str]], list[list[float]]]
    tasks: Callable[[int], list[Task]]
    verify: Callable[[Sequence[Task], Sequence[Sequence[str]]], list[list[float | None]]]
    words_range: tuple[int, int]
    policy: ServedPolicy | None = None


@dataclass(slots=True)
class Rows:
    """Rows to train on.

    Attributes
    ----------
    sources
        Where each row is from.
    set_aside
        What was left out on the way, by reason.
    facts
        What else the run's metrics should say of them.
    """

    rows: list[Row] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    facts: dict[str, float] = field(default_factory=dict)

    def add(self, source: str, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)
        self.sources.append(source)

    def then(self, others: Rows) -> Rows:
        """Return these rows and others after them."""
        return Rows(
            self.rows + others.rows,
            self.sources + others.sources,
            self.set_aside + others.set_aside,
            self.facts | others.facts,
        )

    def shuffled(self, seed: int) -> Rows:
        """Return the rows in another order, the same for the same seed."""
        order = random.Random(seed).sample(range(len(self.rows)), len(self.rows))
        return self.only(order, "")

    def only(self, kept: Sequence[int], reason: str) -> Rows:
        """Return the rows at some places; the others are counted as set aside."""
        over = len(self.rows) - len(kept)
        return Rows(
            [self.rows[n] for n in kept],
            [self.sources[n] for n in kept],
            self.set_aside + Counter({reason: over} if over else {}),
            self.facts,
        )

    def whole(self, batch_rows: int) -> Rows:
        """Return as many rows as make whole batches, the first; the others are counted as set aside."""
        return self.only(range(len(self.rows) - len(self.rows) % batch_rows), "batch_incomplete")

    def check_number(self) -> None:
        """Refuse to train on fewer than there must be.

        Raises
        ------
        UnusableDataError
            Code ``too_few_rows``.
        """
        if len(self.rows) < MIN_ROWS:
            raise UnusableDataError(
                f"Only {len(self.rows)} rows to train on; {MIN_ROWS} are needed.",
                code="too_few_rows",
                set_aside=self.set_aside,
            )

    def newest(self, limit: int) -> Rows:
        """Return the last `limit` rows; those before them are counted as set aside."""
        return self.only(range(max(len(self.rows) - limit, 0), len(self.rows)), "rows_over_budget")


class Recipe(ABC, Generic[C]):
    """A way to train.

    Attributes
    ----------
    Config
        Its settings.
    summary
        A sentence for who chooses among them.
    publishes
        Whether its trainer serves each version itself; otherwise each checkpoint is served.
    whole_batches
        Whether its trainer leaves out a last batch that is not full.
    """

    Config: type[C]
    summary: str
    publishes: bool = False
    whole_batches: bool = False

    @abstractmethod
    def rows(self, material: Material, config: C) -> Rows:
        """Return what is trained on.

        Raises
        ------
        UnusableDataError
            With the reason, where the data cannot be trained on.
        """

    @abstractmethod
    def trainer(self, config: C, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material) -> Any:
        """Return TRL's trainer.

        Parameters
        ----------
        arguments
            What every trainer's configuration is given (:func:`trainer.loop.arguments`).
        parts
            What every trainer is given: ``model`` and, where the adapter is new, ``peft_config``;
            ``train_dataset``, ``processing_class``, ``callbacks``.
        material
            What the rows were made from, for those that sample and score as they train.
        """


def one_per_prompt(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return one example for each prompt, the newest; a seeded choice where there are more than fit."""
    found = list({json.dumps(example.messages): example for example in examples}.values())
    random.Random(seed).shuffle(found)
    return found[:limit]


def spread_of(rewards: Sequence[Sequence[float]]) -> float:
    """Return the median over prompts of the standard deviation of their samples' rewards."""
    spreads = [statistics.pstdev(group) for group in rewards if len(group) > 1 and all(map(math.isfinite, group))]
    return statistics.median(spreads) if spreads else 0.0


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(recipes.__path__))


def open_recipe(name: str) -> Recipe[Any]:
    """Return a recipe.

    Raises
    ------
    InvalidRequestError
        Code ``recipe_unknown``.
    """
    if name not in names():
        raise InvalidRequestError(f"There is no recipe {name!r}. {nearest(name, names())}", code="recipe_unknown")
    found: Recipe[Any] = importlib.import_module(f"trainer.recipes.{name.replace('-', '_')}").RECIPE
    return found


def resolve(given: Mapping[str, Any]) -> tuple[Recipe[Any], RunConfig]:
    """Return the recipe that settings name, and its whole configuration.

    Raises
    ------
    InvalidRequestError
        Codes ``recipe_unknown``, ``verifier_unknown``, ``reporter_missing`` and ``config_invalid``.
    """
    recipe = open_recipe(str(given.get("recipe", DEFAULT_RECIPE)))
    config: RunConfig = recipe.Config.parse(given)
    verify.check_names(config.verifiers)
    for package in config.report_to:
        if importlib.util.find_spec(package) is None:
            raise InvalidRequestError(
                f"report_to names {package}, which is not installed here: pip install {package}.",
                code="reporter_missing",
            )
    return recipe, config
