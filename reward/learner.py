"""The streaming learner: what one signal does to the posterior and to all that guards it. Nothing is stored here.

A signal is predicted (calibration, drift), weighed (what its kind is worth, who chose to rate, how far its rater is
trusted), and learned, or held where its rater is set aside. A gold probe, a ruling or a better record changes who
counts; what they said before is then taken out, or in, by rank-one updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from reward.bursts import WINDOW_S, Bursts
from reward.calibration import Calibration
from reward.drift import Adwin
from reward.kinds import Kinds
from reward.online import PRIOR_VARIANCE, BayesianHead, Score, Site
from reward.propensity import Anchor, Propensity
from reward.raters import CROWD, Pool, Rater, Raters, Ruling, new_pools

Vector = NDArray[np.float64]
Action = Literal["add", "remove", "hold", "inflate"]

INFLATION = 1.5  # of the variance, where people changed
ABSTAIN_SD = 2.5
ABSTAIN_RATIO = 2.0
USUAL_FADES = 0.99
MIN_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True)
class Observation:
    """A signal as the head sees it.

    Attributes
    ----------
    target
        0 bad (or worse) to 1 good (or better).
    weight
        What it is worth, whoever said it: kind times propensity.
    pair
        Whether ``z`` is a difference of two answers.
    p_self
        The assistant's own probability that the answer was good, where it gave one.
    block, at_s
        The rater's block of addresses, and when they said it (seconds since 1970), where these are known.
    """

    feedback_id: str
    rater: str
    key: str
    z: Vector
    target: float
    weight: float = 1.0
    pair: bool = False
    p_self: float | None = None
    block: str | None = None
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the history: what was done with an observation, and the site that it made.

    Attributes
    ----------
    site
        What was added to the posterior, or taken out of it; None where neither was done.
    inflation
        Product of all inflations up to this step: what a site is worth has shrunk by those since.
    """

    action: Action
    feedback_id: str
    key: str
    z: Vector
    verdict: float
    weight: float
    site: Site | None
    inflation: float
    p_before: float | None = None


class Book(Protocol):
    """Where the latest change of each signal of a rater is found again: a table, or a dictionary in a test."""

    def of_rater(self, rater: str) -> Iterable[Change]:
        """Return the latest change of each of their signals that was added or held."""
        ...


@dataclass(slots=True)
class Threshold:
    """A running quantile: which answers would teach more than nineteen of twenty.

    Robbins and Monro (1951), A stochastic approximation method; the step follows the values' own size.
    """

    level: float = 0.95
    value: float = 0.0
    mean: float = 0.0
    num_seen: int = 0

    def is_high(self, x: float) -> bool:
        """Tell whether `x` lies above it, and move it."""
        high = self.num_seen >= 20 and x > self.value
        self.num_seen += 1
        rate = max(0.01, 1.0 / self.num_seen)
        self.mean += rate * (x - self.mean)
        self.value = x if self.num_seen == 1 else self.value + rate * self.mean * (self.level - (x <= self.value))
        return high


@dataclass(slots=True)
class Guards:
    """All state beside the posterior and the raters; stored as JSON."""

    kinds: Kinds = field(default_factory=Kinds)
    calibration: Calibration = field(default_factory=Calibration)
    drift: Adwin = field(default_factory=Adwin)
    propensity: Propensity = field(default_factory=Propensity)
    anchor: Anchor = field(default_factory=Anchor)
    bursts: Bursts = field(default_factory=Bursts)
    asking: Threshold = field(default_factory=Threshold)
    pools: list[Pool] = field(default_factory=list)
    inflation: float = 1.0
    usual_sd: float = 0.0

    def dump(self) -> bytes:
        """Return the state as JSON; floats come back bit for bit."""
        return _guards.dump_json(self)

    @classmethod
    def read(cls, raw: bytes | str) -> Guards:
        """Return the state that :meth:`dump` wrote."""
        return _guards.validate_json(raw)


_guards = TypeAdapter(Guards)


class Learner:
    """The posterior and its guards.

    Parameters
    ----------
    raters
        All that are known.
    """

    def __init__(self, head: BayesianHead, guards: Guards | None = None, raters: Iterable[Rater] = ()) -> None:
        self.head = head
        self.guards = guards or Guards()
        self.raters = Raters(self.guards.pools or new_pools())
        for rater in raters:
            self.raters.admit(rater)
        self.guards.pools = self.raters.pools

    def learn(self, seen: Observation, book: Book) -> tuple[Score, Score, list[Change]]:
        """Learn one observation.

        Returns
        -------
        before, after
            The head's score of ``z``.
        changes
            In their order; the last but for an inflation is the observation's own, "add" or "hold".

        Raises
        ------
        InvalidRequestError
            Where features, target or weight are not usable; nothing has changed.
        """
        self.head.check(seen.z)
        rater = self.raters.get(seen.rater, seen.block, seen.at_s or 0.0)
        involved = [rater, *self._watch_bursts(rater, seen)]
        weight = self.raters.weigh(rater) * seen.weight
        changes = self._settle(involved, book)
        if weight < MIN_WEIGHT:
            s, before = seen, self.head.predict_one(seen.z)
            held = Change("hold", s.feedback_id, s.key, s.z, s.target, s.weight, None, self._inflation)
            return before, before, [*changes, held]
        site, before, after = self.head.learn_scored(seen.z, seen.target, weight)
        calibration = self.guards.calibration
        p_before = calibration.p_good(before.p_good, seen.p_self, pair=seen.pair)
        added = self._added(seen.feedback_id, seen.key, seen.target, weight, site, p_before)
        loss = calibration.observe(before.p_good, seen.target, seen.p_self, pair=seen.pair)
        return before, after, [*changes, added, *self._watch_drift(loss)]

    def teach(self, feedback_id: str, z: Vector, target: float) -> Change:
        """Learn what nobody doubts: a gold probe."""
        site, before, _ = self.head.learn_scored(z, target)
        return self._added(feedback_id, "gold", target, 1.0, site, before.p_good)

    def withdraw(self, change: Change) -> Change:
        """Take out what a signal did, for good."""
        return self._out("remove", change)

    def check(self, rater: str, *, right: bool, book: Book) -> list[Change]:
        """Hold a vote against a gold probe; take out, or in, what raters said who now count for less, or more."""
        self.raters.check(self.raters.get(rater), right=right)
        return self._settle(self.raters.by_name.values(), book)

    def rule(self, names: Iterable[str], ruling: Ruling | None, book: Book) -> list[Change]:
        """Follow an operator's decision about raters; None leaves them to their record again."""
        raters = [self.raters.get(name) for name in names]
        for rater in raters:
            rater.ruling, rater.quarantine = ruling, None
        return self._settle(raters, book)

    def p_good(self, score: Score, p_self: float | None = None) -> float:
        """Return the calibrated probability that an answer is good."""
        return self.guards.calibration.p_good(score.p_good, p_self)

    def abstains(self, score: Score) -> bool:
        """Tell whether the model knows too little of an answer to say anything."""
        return abstains(score.sd, self.guards.usual_sd)

    def note_usual(self, sd: float) -> None:
        """Keep the usual standard deviation of new answers, to tell unusual ones by it."""
        usual = self.guards.usual_sd
        self.guards.usual_sd = sd if not usual else USUAL_FADES * usual + (1.0 - USUAL_FADES) * sd

    @property
    def _inflation(self) -> float:
        return self.guards.inflation

    def _added(
        self, feedback_id: str, key: str, target: float, weight: float, site: Site, p_before: float | None = None
    ) -> Change:
        return Change("add", feedback_id, key, site.z, target, weight, site, self._inflation, p_before)

    def _settle(self, raters: Iterable[Rater], book: Book) -> list[Change]:
        """Take out what those of them said who no longer count, and in what those did who count again."""
        changes = []
        for rater in self.raters.unsettled(raters):
            self.raters.get(rater.name).set_aside = not rater.set_aside
            for change in book.of_rater(rater.name):
                if rater.set_aside and change.action == "add":
                    changes.append(self._out("hold", change))
                elif not rater.set_aside and change.action == "hold" and change.weight >= MIN_WEIGHT:
                    c = change
                    site = self.head.learn_one(c.z, c.verdict, c.weight)
                    changes.append(self._added(c.feedback_id, c.key, c.verdict, c.weight, site))
        return changes

    def _out(self, action: Action, c: Change) -> Change:
        site = None
        if c.action == "add" and c.site is not None:
            site = Site(c.site.z, c.site.precision * c.inflation / self._inflation, c.site.target)
            self.head.unlearn_one(site)
        return Change(action, c.feedback_id, c.key, c.z, c.verdict, c.weight, site, self._inflation)

    def _watch_bursts(self, rater: Rater, seen: Observation) -> list[Rater]:
        """Quarantine a fresh rater who comes in a burst; return those who came before them in it."""
        if seen.at_s is None:
            return []
        self.guards.bursts.note_time(seen.at_s)
        if self.raters.num_established < CROWD:
            return []
        if not rater.is_fresh:
            self.guards.bursts.established_voted(seen.at_s)
            return []
        found = self.guards.bursts.fresh_voted(seen.block, seen.at_s, f"qu_{seen.feedback_id}")
        if found is None:
            return []
        quarantine, block = found
        rater.quarantine = quarantine
        if quarantine != f"qu_{seen.feedback_id}":
            return []
        earlier = [r for r in self.raters.fresh_since(seen.at_s - WINDOW_S, block) if r is not rater]
        for other in earlier:
            other.quarantine = quarantine
        return earlier

    def _watch_drift(self, loss: float) -> list[Change]:
        if not self.guards.drift.observe(loss):
            return []
        factor = min(INFLATION, PRIOR_VARIANCE / self.head.mean_variance)
        if factor <= 1.0:
            return []
        self.head.inflate(factor)
        self.guards.inflation *= factor
        nothing = np.empty(0)
        return [Change("inflate", "", "drift", nothing, 0.0, 1.0, Site(nothing, factor, 0.0), self._inflation)]


def abstains(sd: float, usual_sd: float) -> bool:
    """Tell whether a standard deviation is too high to say anything: in itself, or against the usual one."""
    return sd > ABSTAIN_SD or (usual_sd > 0.0 and sd > ABSTAIN_RATIO * usual_sd)
