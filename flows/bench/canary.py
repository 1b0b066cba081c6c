"""``everloop bench canary``: how often the canary errs, and how soon it decides, over simulated votes.

Each simulated canary is looked at after every vote. A tenth of the rows also goes through the state machine itself
(:mod:`deploy.rollout`), which must stop at the same pair. The last row replays real votes between language models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ville import BettingTest

from deploy.canary import GUARDRAILS
from deploy.eprocess import HigherRate
from deploy.rollout import BETTER, WORSE, Event, Plan, Rollout
from flows.bench.sources import MISSING, wheel_file
from infra import report

BASE_RATE = 0.7
CHECKED = 20  # canaries of each row that the state machine replays
# pairs that a test of a fixed size needs (alpha .05 one-sided, power .8), for the same rates
FIXED_SAMPLE = {0.8: 229, 0.6: 278, 0.5: 71, 0.3: 16}
Votes = tuple[NDArray[np.bool_], NDArray[np.bool_]]
Draw = Callable[[np.random.Generator, float, int], Votes]


@dataclass(frozen=True, slots=True)
class Row:
    """Canaries of one kind.

    Attributes
    ----------
    rate
        Of good votes among the challenger's users; the champion's is the base rate.
    in_a_row
        Candidates that share alpha; the row errs where any of them does.
    """

    name: str
    rate: float
    draw: Draw
    in_a_row: int = 1


def at_once(rng: np.random.Generator, rate: float, num_pairs: int) -> Votes:
    """Votes that come with their answers."""
    return rng.random(num_pairs) < BASE_RATE, rng.random(num_pairs) < rate


def late(rng: np.random.Generator, rate: float, num_pairs: int) -> Votes:
    """Half of the votes come after the answer has settled; bad ones take three times as long."""
    return _arrive(rng, rate, num_pairs, bad_delay_s=(90.0, 90.0))


def late_by_arm(rng: np.random.Generator, rate: float, num_pairs: int) -> Votes:
    """As :func:`late`, but only the challenger's bad votes hesitate: outside of what is promised."""
    return _arrive(rng, rate, num_pairs, bad_delay_s=(30.0, 90.0))


def late_by_arm_settled(rng: np.random.Generator, rate: float, num_pairs: int) -> Votes:
    """The same, with answers that count after five minutes."""
    return _arrive(rng, rate, num_pairs, bad_delay_s=(30.0, 90.0), settle_s=300.0)


def missing(rng: np.random.Generator, rate: float, num_pairs: int) -> Votes:
    """Of the champion's users half vote, of the challenger's a third, as they come."""
    return _arrive(rng, rate, num_pairs, bad_delay_s=(30.0, 30.0), votes=(1 / 2, 1 / 3))


def _arrive(
    rng: np.random.Generator,
    rate: float,
    num_pairs: int,
    bad_delay_s: tuple[float, float],
    votes: tuple[float, float] = (1.0, 1.0),
    settle_s: float = 30.0,
) -> Votes:
    """Users begin an answer every second, half of them the challenger's; return votes in the order of the log."""
    num_users = round(2.2 * num_pairs / min(votes)) + 200
    began_s = np.arange(num_users, dtype=float)
    arm = (rng.random(num_users) < 0.5).astype(int)
    good = rng.random(num_users) < np.where(arm == 1, rate, BASE_RATE)
    delay_s = rng.exponential(np.where(good, 30.0, np.array(bad_delay_s)[arm]))
    # A look every second takes what has settled, in the order of beginnings; what is later, when it comes.
    taken_s = np.ceil(np.maximum(began_s + settle_s, began_s + delay_s))
    has_voted = rng.random(num_users) < np.array(votes)[arm]
    order = np.lexsort((began_s, taken_s))
    order = order[has_voted[order]]
    champion, challenger = (good[order[arm[order] == which]][:num_pairs] for which in (0, 1))
    return champion, challenger


ROWS = (
    Row("equal", BASE_RATE, at_once),
    Row("equal, votes late", BASE_RATE, late),
    Row("equal, votes missing by arm", BASE_RATE, missing),
    Row("equal, ten candidates in a row", BASE_RATE, at_once, in_a_row=10),
    Row("better, .80", 0.8, at_once),
    Row("worse, .60", 0.6, at_once),
    Row("worse, .50", 0.5, at_once),
    Row("worse, .30", 0.3, at_once),
    Row("equal, only the challenger's bad votes late", BASE_RATE, late_by_arm),
    Row("the same, settled for 300 s", BASE_RATE, late_by_arm_settled),
)


def measure(num_canaries: int, max_pairs: int, alpha: float, seed: int) -> dict[str, Any]:
    """Return errors and median pairs; the last two rows are not among the totals."""
    rows = {}
    with report.Phase("bench canary", num_canaries * sum(row.in_a_row for row in ROWS)) as phase:
        for row in ROWS:
            rows[row.name] = _row(row, num_canaries, max_pairs, alpha, np.random.default_rng(seed), phase)
    promised = [rows[row.name] for row in ROWS if row.draw not in (late_by_arm, late_by_arm_settled)]
    not_better = [found for found in promised if found["rate"] <= BASE_RATE]
    not_worse = [found for found in promised if found["rate"] >= BASE_RATE]
    return {
        "canaries_per_row": num_canaries,
        "alpha": alpha,
        "false_promote": max(found["promoted"] for found in not_better),
        "false_rollback": max(found["rolled_back"] for found in not_worse),
        **{f"pairs_{round(100 * found['rate'])}": found["pairs"] for found in promised if found["pairs"]},
        "rows": rows,
        "ville": beside_ville(alpha, max_pairs, seed),
        "arena": arena(alpha, seed),
    }


def beside_ville(alpha: float, max_pairs: int, seed: int, num_canaries: int = 300) -> dict[str, dict[str, float]]:
    """Return median and 90 % quantile of pairs of bets on bounded differences (package ville), same limits."""
    found = {}
    for row in ROWS:
        if row.rate == BASE_RATE:
            continue
        rng, limit = np.random.default_rng(seed), plan_of(alpha, 1).limit(BETTER if row.rate > BASE_RATE else WORSE)
        stops = []
        for _ in range(num_canaries):
            champion, challenger = row.draw(rng, row.rate, max_pairs)
            differences = (challenger * 1.0 - champion) * (1.0 if row.rate > BASE_RATE else -1.0)
            test = BettingTest(0.0, bounds=(-1.0, 1.0), alternative="greater").fit(differences)
            reached = test.log_e_values_ >= math.log(limit)
            stops.append(int(np.argmax(reached)) + 1 if reached.any() else math.inf)
        found[row.name] = {"pairs": float(np.median(stops)), "tenth_slowest": float(np.quantile(stops, 0.9))}
    return found


def plan_of(alpha: float, candidate: int, steps: Sequence[float] = (0.5,)) -> Plan:
    """Return the plan of a candidate for whom the first candidate's part of the budget is `alpha`."""
    return Plan(
        steps=tuple(steps),
        alpha=2.0 * alpha,
        candidate=candidate,
        step_users=1,
        step_s=0.0,
        max_s=math.inf,
        guardrails=GUARDRAILS,
    )


def _row(
    row: Row, num_canaries: int, max_pairs: int, alpha: float, rng: np.random.Generator, phase: report.Phase
) -> dict[str, Any]:
    promoted = rolled_back = 0
    pairs: list[float] = []
    for number in range(num_canaries):
        decisions = set()
        for candidate in range(1, row.in_a_row + 1):
            # One candidate has all of alpha; several share it, as those since a promotion do.
            plan = plan_of(alpha if row.in_a_row == 1 else alpha / 2, candidate)
            votes = row.draw(rng, row.rate, max_pairs)
            decision, stop = decide(plan, *votes)
            if number < CHECKED // row.in_a_row + 1:
                assert through_the_state_machine(plan, *votes) == (decision, stop), (row, number)
            decisions.add(decision)
            pairs.append(stop if decision else math.inf)
            phase.advance()
        promoted += "promote" in decisions
        rolled_back += "rollback" in decisions
    found: dict[str, Any] = {
        "rate": row.rate,
        "promoted": promoted / num_canaries,
        "rolled_back": rolled_back / num_canaries,
        "pairs": None,
    }
    if row.rate != BASE_RATE:
        fixed = FIXED_SAMPLE[row.rate]
        median = float(np.median(pairs))
        found |= {"pairs": median, "quartiles": [float(np.quantile(pairs, q)) for q in (0.25, 0.75)]}
        found |= {"tenth_slowest": float(np.quantile(pairs, 0.9))}
        found |= {"fixed_sample_pairs": fixed, "of_fixed_sample": round(median / fixed, 2)}
    return found


def decide(plan: Plan, champion: NDArray[np.bool_], challenger: NDArray[np.bool_]) -> tuple[str | None, int]:
    """Return what pairs of votes decide, and after how many; all pairs at once, as the state machine would."""
    num_pairs = min(len(champion), len(challenger))
    a, b = champion[:num_pairs], challenger[:num_pairs]
    counts = np.cumsum(np.stack([a, ~a, b, ~b], axis=1), axis=0).astype(float)
    process = HigherRate([1])
    stops = {}
    for name, seen in ((BETTER, counts), (WORSE, counts[:, [1, 0, 3, 2]])):
        reached = process.log_e(seen) >= math.log(plan.limit(name))
        stops[name] = int(np.argmax(reached)) + 1 if reached.any() else num_pairs + 1
    first = min(stops.values())
    if first > num_pairs:
        return None, num_pairs
    return ("rollback" if stops[WORSE] == first else "promote"), first


def through_the_state_machine(
    plan: Plan, champion: NDArray[np.bool_], challenger: NDArray[np.bool_]
) -> tuple[str | None, int]:
    """Return the same by :class:`deploy.rollout.Rollout`."""
    rollout = Rollout(plan)
    rollout.apply(Event(0.0, "trial", "challenger"))
    for a, b in zip(champion, challenger, strict=False):
        rollout.apply(Event(0.0, "vote", "champion", good=bool(a)))
        rollout.apply(Event(0.0, "vote", "challenger", good=bool(b)))
        if rollout.decision:
            break
    return rollout.decision, rollout.num_pairs


def arena(alpha: float, seed: int, max_pairs: int = 2000) -> dict[str, Any]:
    """Let models of the chatbot arena be each other's challenger: their wins against third models are the votes.

    For each two that played at least `max_pairs` games, the one that won less of all its games is the champion; the
    order of their votes is random, as the data has no times.
    """
    path = wheel_file("leaderbot", "data", "chatbotarena_20240814.json")
    if path is None:
        return {"skipped": MISSING.format("leaderbot")}
    data = json.loads(path.read_text())
    matches, counts = np.array(data["X"]), np.array(data["Y"])[:, :2].astype(int)
    won, lost = np.zeros(len(data["models"]), int), np.zeros(len(data["models"]), int)
    for (one, other), (first, second) in zip(matches, counts, strict=True):
        won[one], lost[one] = won[one] + first, lost[one] + second
        won[other], lost[other] = won[other] + second, lost[other] + first
    rate = won / np.maximum(won + lost, 1)
    known = [int(m) for m in np.argsort(rate) if won[m] + lost[m] >= max_pairs]
    rng = np.random.default_rng(seed)
    outcomes: dict[str | None, int] = {"promote": 0, "rollback": 0, None: 0}
    pairs, gaps = [], []
    for at, champion in enumerate(known):
        for challenger in known[at + 1 :]:
            votes = [
                rng.permutation(np.repeat([True, False], [won[m], lost[m]]))[:max_pairs]
                for m in (champion, challenger)
            ]
            decision, stop = decide(plan_of(alpha, 1), votes[0], votes[1])
            outcomes[decision] += 1
            gaps.append(rate[challenger] - rate[champion])
            pairs.append(stop)
    wide = [decided for decided, gap in zip(pairs, gaps, strict=True) if gap >= 0.1]
    return {
        "models": len(known),
        "canaries": len(pairs),
        "promoted": outcomes["promote"],
        "rolled_back": outcomes["rollback"],
        "undecided": outcomes[None],
        "median_pairs_where_the_gap_is_10_points": float(np.median(wide)) if wide else None,
        "canaries_with_that_gap": len(wide),
    }
