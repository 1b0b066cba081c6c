"""A canary as a state machine: what its evidence decides, event by event.

Nothing here reads a clock or a database: the same plan and the same events give the same decision, so every
decision can be recomputed from the log (`everloop canary explain`).

Each user is one trial, by the arm of the user's first settled answer, and has one vote, by the arm of the
answer that was voted on. Trials feed the guardrails, votes the two tests of quality. The budget `alpha` of a
decision is divided over its tests, so the chance that any of them errs is at most alpha, whatever they have to
do with each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from deploy.eprocess import LARGE_EFFECTS, HigherRate

BETTER, WORSE = "better", "worse"
MAX_RATIO = 19
# Trials of one arm that have waited longer for the other are left out: arms are compared in the same hours.
MAX_WAITING_BLOCKS = 10
Arm = Literal["champion", "challenger"]
Decision = Literal["promote", "rollback", "expired"]


class Guardrail(BaseModel):
    """Something that may not happen to more of the challenger's users than to the champion's."""

    model_config = ConfigDict(frozen=True)

    name: str
    margin: float = Field(ge=0, lt=1, description="How much more often it may happen, as a difference of shares.")
    alpha_share: float = Field(gt=0, lt=1, description="Its part of the budget of a rollback.")


class Plan(BaseModel):
    """How a canary proceeds; fixed when it opens."""

    model_config = ConfigDict(frozen=True)

    steps: tuple[float, ...] = Field(min_length=1, description="Shares of users who meet the challenger.")
    alpha: float = Field(gt=0, lt=1, description="Of all candidates since the last promotion.")
    candidate: int = Field(ge=1, description="Which of them this is, counted from 1.")
    step_users: int = Field(ge=1, description="Users of the challenger before the next step, or a promotion.")
    step_s: float = Field(ge=0, description="Least length of a step.")
    max_s: float = Field(gt=0, description="After which an undecided canary ends.")
    guardrails: tuple[Guardrail, ...] = ()
    slow_ms: float | None = Field(None, description="Answers that took longer count as slow.")
    words: tuple[float, float] | None = Field(None, description="Answers outside count as of unusual length.")

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError("Steps must rise: who met the challenger keeps meeting it.")
        return steps

    @property
    def candidate_alpha(self) -> float:
        """What is spent on this candidate: 1/2, 1/6, 1/12, … of alpha, which is never more than alpha in all."""
        return self.alpha / (self.candidate * (self.candidate + 1))

    def limit(self, test: str) -> float:
        """Return the e-value at which a test decides."""
        shares = {guardrail.name: guardrail.alpha_share for guardrail in self.guardrails}
        share = 1.0 if test == BETTER else 1.0 - sum(shares.values()) if test == WORSE else shares[test]
        return 1.0 / (share * self.candidate_alpha)

    def ratio(self, step: int) -> int:
        """Return how many of the champion's trials stand beside one of the challenger's at a step."""
        share = self.steps[step]
        return min(max(round((1.0 - share) / share), 1), MAX_RATIO)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a canary.

    Attributes
    ----------
    at_s
        Seconds since it opened.
    kind
        ``trial``: a user's first answer has settled; ``vote``: a user's vote counts; ``tick``: time has passed, and
        what time and users allow is done;
        ``hold`` and ``resume``: an operator stops automatic decisions, and lets them go on.
    flags
        Of a trial: the guardrails' events that happened.
    good
        Of a vote.
    """

    at_s: float
    kind: Literal["trial", "vote", "tick", "hold", "resume"]
    arm: Arm | None = None
    flags: frozenset[str] = frozenset()
    good: bool | None = None


class Test:
    """One e-process along the trials that have come so far.

    Attributes
    ----------
    e, highest
        Its e-value now, and the highest that it has had: to have reached the limit once is enough.
    """

    def __init__(self, process: HigherRate, limit: float) -> None:
        self.process = process
        self.limit = limit
        self.counts = np.zeros(len(process.table))
        self.e = self.highest = 1.0

    def take(self, ratio: int, champion: Sequence[bool], challenger: bool) -> None:
        """Multiply by a block."""
        yes = sum(champion)
        self.counts[self.process.columns(ratio)] += (yes, len(champion) - yes, challenger, not challenger)
        self.e = math.exp(min(float(self.process.log_e(self.counts)), 700.0))
        self.highest = max(self.highest, self.e)

    @property
    def decides(self) -> bool:
        """Whether the limit was reached."""
        return self.highest >= self.limit


class Blocks:
    """Trials that wait for the others of their block, and the tests that blocks are for."""

    def __init__(self, tests: dict[str, Test]) -> None:
        self.tests = tests
        self.waiting: dict[Arm, deque[dict[str, bool]]] = {"champion": deque(), "challenger": deque()}

    def add(self, arm: Arm, outcomes: dict[str, bool], ratio: int) -> bool:
        """Take a trial, with the outcome for each test; return whether it completed a block."""
        queue = self.waiting[arm]
        queue.append(outcomes)
        if len(queue) > MAX_WAITING_BLOCKS * (ratio if arm == "champion" else 1):
            queue.popleft()  # which depends on who came, not on what they said
        ours, others = self.waiting["challenger"], self.waiting["champion"]
        if not ours or len(others) < ratio:
            return False
        challenger, champion = ours.popleft(), [others.popleft() for _ in range(ratio)]
        for name, test in self.tests.items():
            test.take(ratio, [outcome[name] for outcome in champion], challenger[name])
        return True


@dataclass
class Tally:
    """What was counted of an arm."""

    trials: int = 0
    votes: int = 0
    good: int = 0
    flags: dict[str, int] = field(default_factory=dict)


class Rollout:
    """A canary in progress: feed it events in their order.

    Attributes
    ----------
    step
        Index of the present step of the plan.
    decision, because
        What its evidence has decided, if anything, and by which test.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        ratios = [plan.ratio(step) for step in range(len(plan.steps))]
        self.votes = Blocks({name: Test(HigherRate(ratios), plan.limit(name)) for name in (BETTER, WORSE)})
        self.trials = Blocks(
            {g.name: Test(HigherRate(ratios, g.margin, LARGE_EFFECTS), plan.limit(g.name)) for g in plan.guardrails}
        )
        self.tallies: dict[Arm, Tally] = {"champion": Tally(), "challenger": Tally()}
        self.step = 0
        self.step_began_s = 0.0
        self.step_users = 0
        self.num_pairs = 0
        self.is_held = False
        self.decision: Decision | None = None
        self.because = ""

    @property
    def share(self) -> float:
        """The share of users who meet the challenger now."""
        return self.plan.steps[self.step]

    @property
    def tests(self) -> dict[str, Test]:
        """All tests by name."""
        return self.votes.tests | self.trials.tests

    def apply(self, event: Event) -> None:
        """Take an event.

        A decision that nobody acts on can still change: harm ends a promotion, and time ends both.
        """
        if self.decision == "expired":
            return
        if event.kind in ("hold", "resume"):
            self.is_held = event.kind == "hold"
        elif event.kind == "trial":
            self._trial(event)
        elif event.kind == "vote":
            self._vote(event)
        if not self.is_held:
            self._decide(event)

    def _trial(self, event: Event) -> None:
        assert event.arm is not None
        tally = self.tallies[event.arm]
        tally.trials += 1
        for flag in event.flags:
            tally.flags[flag] = tally.flags.get(flag, 0) + 1
        self.step_users += event.arm == "challenger"
        outcomes = {guardrail.name: guardrail.name in event.flags for guardrail in self.plan.guardrails}
        self.trials.add(event.arm, outcomes, self.plan.ratio(self.step))

    def _vote(self, event: Event) -> None:
        assert event.arm is not None and event.good is not None
        tally = self.tallies[event.arm]
        tally.votes += 1
        tally.good += event.good
        outcomes = {BETTER: event.good, WORSE: not event.good}
        self.num_pairs += self.votes.add(event.arm, outcomes, self.plan.ratio(self.step))

    def _decide(self, event: Event) -> None:
        tests = self.tests
        if event.at_s >= self.plan.max_s:
            self.decision, self.because = "expired", "time"
            return
        harm = [name for name in tests if name != BETTER and tests[name].decides]
        if harm:
            self.decision, self.because = "rollback", harm[0]
        elif self.decision is not None:
            return
        elif tests[BETTER].decides and self.tallies["challenger"].trials >= self.plan.step_users:
            self.decision, self.because = "promote", BETTER
        elif event.kind == "tick" and self.may_step(event.at_s):
            self.step, self.step_began_s, self.step_users = self.step + 1, event.at_s, 0

    def is_due(self, at_s: float, *, may_step: bool = True) -> bool:
        """Tell whether a tick at that time would change anything that may be changed."""
        if self.decision == "expired" or self.is_held:
            return False
        return at_s >= self.plan.max_s or (may_step and self.decision is None and self.may_step(at_s))

    def may_step(self, at_s: float) -> bool:
        """More users meet it when enough have, and no test is half way (in logarithm) to a rollback."""
        doubtful = any(test.e > math.sqrt(test.limit) for name, test in self.tests.items() if name != BETTER)
        return (
            self.step + 1 < len(self.plan.steps)
            and self.step_users >= self.plan.step_users
            and at_s - self.step_began_s >= self.plan.step_s
            and not doubtful
        )

    def evidence(self) -> dict[str, Any]:
        """Return all that the decision rests on, as plain data."""
        arms = {arm: vars(tally) for arm, tally in self.tallies.items()}
        tests = {
            name: {"e": test.e, "highest": test.highest, "limit": test.limit} for name, test in self.tests.items()
        }
        return {
            "decision": self.decision,
            "because": self.because,
            "step": self.step,
            "share": self.share,
            "num_pairs": self.num_pairs,
            "is_held": self.is_held,
            "arms": arms,
            "tests": tests,
        }

    def sentence(self) -> str:
        """Say the evidence in one sentence."""
        champion, challenger = self.tallies["champion"], self.tallies["challenger"]
        verdict = {
            None: "not decided" if not self.is_held else "held by an operator",
            "promote": "the challenger is better",
            "rollback": "the challenger is worse" if self.because == WORSE else f"guardrail {self.because}",
            "expired": "not decided in time",
        }[self.decision]
        named = self.because if self.because in self.trials.tests else ""
        tests = [name for name in (BETTER, WORSE, named) if name]
        values = ", ".join(f"{n} {self.tests[n].highest:.3g} of {self.tests[n].limit:.3g}" for n in tests)
        return (
            f"{verdict}: {challenger.good}/{challenger.votes} good votes against {champion.good}/{champion.votes}; "
            f"highest e-values: {values}"
        )


def replay(plan: Plan, events: Iterable[Event]) -> Rollout:
    """Return a canary after events."""
    rollout = Rollout(plan)
    for event in events:
        rollout.apply(event)
    return rollout
