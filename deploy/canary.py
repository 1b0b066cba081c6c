"""The canary's decision: two one-sided e-processes over the votes of two arms.

Votes of the arms are paired in the order in which they came. For each pair an e-variable compares
"the challenger is better" with "no better": the alternative is estimated from earlier pairs only, the null
is its information projection on equal rates, so the product stays a test martingale whenever one looks,
and the chance that it ever reaches 1/alpha under the null is at most alpha (Ville).

References
----------
Turner, Ly and Gruenwald (2024), Generic e-variables for exact sequential k-sample tests that allow for
optional stopping. Journal of Statistical Planning and Inference 230.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

PRIOR = 0.5  # Jeffreys-like pseudo-counts of each arm's estimate
Decision = Literal["promote", "rollback", "hold"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the decision rests on."""

    num_pairs: int
    champion_votes: int
    champion_good: int
    challenger_votes: int
    challenger_good: int
    e_better: float
    e_worse: float
    limit: float
    decision: Decision

    def as_dict(self) -> dict[str, object]:
        """Return the evidence as plain data."""
        return asdict(self)

    def sentence(self) -> str:
        """Say the evidence in one sentence."""
        verdict = {
            "promote": "the challenger is better",
            "rollback": "the challenger is worse",
            "hold": "not decided",
        }[self.decision]
        return (
            f"{verdict}: {self.challenger_good}/{self.challenger_votes} good votes against "
            f"{self.champion_good}/{self.champion_votes}; e-value better {self.e_better:.3g}, "
            f"worse {self.e_worse:.3g}, limit {self.limit:.3g}"
        )


def decide(champion: Sequence[bool], challenger: Sequence[bool], alpha: float) -> Evidence:
    """Decide from the votes of each arm, in the order in which they came.

    Parameters
    ----------
    champion, challenger
        True for a good vote.
    alpha
        Bound on the chance of promoting a challenger that is no better, and of rolling back one that is
        no worse, each with a look after every vote.
    """
    better, worse = e_processes(champion, challenger)
    limit = 1.0 / alpha
    decision: Decision = "hold"
    if max(better) >= limit:
        decision = "promote"
    elif max(worse) >= limit:
        decision = "rollback"
    return Evidence(
        num_pairs=min(len(champion), len(challenger)),
        champion_votes=len(champion),
        champion_good=sum(champion),
        challenger_votes=len(challenger),
        challenger_good=sum(challenger),
        e_better=max(better),
        e_worse=max(worse),
        limit=limit,
        decision=decision,
    )


def e_processes(champion: Sequence[bool], challenger: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Return the e-process for "better" and the one for "worse" after each pair, starting at 1."""
    better, worse = [1.0], [1.0]
    good_a = good_b = 0
    for n, (a, b) in enumerate(zip(champion, challenger, strict=False)):
        p_a = (good_a + PRIOR) / (n + 2 * PRIOR)
        p_b = (good_b + PRIOR) / (n + 2 * PRIOR)
        factor = pair_e_value(a, b, p_a, p_b)
        better.append(better[-1] * (factor if p_b > p_a else 1.0))
        worse.append(worse[-1] * (factor if p_b < p_a else 1.0))
        good_a += a
        good_b += b
    return better, worse


def pair_e_value(a: bool, b: bool, p_a: float, p_b: float) -> float:
    """Return the e-variable of one pair for the alternative rates `p_a`, `p_b` against equal rates."""
    p_0 = (p_a + p_b) / 2.0
    return (_likelihood(a, p_a) * _likelihood(b, p_b)) / (_likelihood(a, p_0) * _likelihood(b, p_0))


def _likelihood(good: bool, p: float) -> float:
    return p if good else 1.0 - p
