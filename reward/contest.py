"""The prequential contest: which of two encoders predicts the newest comparisons better.

Under each a fresh head learns the older comparisons in their order; each of the newest is then predicted before it
is learned. What counts is the log loss, pair by pair.

References
----------
Dawid (1984), Statistical theory: the prequential approach. Diebold and Mariano (1995), Comparing predictive
accuracy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infra.errors import InvalidRequestError
from reward.online import BayesianHead

NEWEST_SHARE = 0.1
MIN_JUDGED = 30
# One-sided 5 %: a candidate as good as the active encoder wins one contest in twenty.
MIN_EVIDENCE = 1.645
# Losses that differ by less (nats) are equal: else rounding could win.
MIN_DIFFERENCE = 1e-6

Verdict = Literal["win", "lose", "too_few"]


@dataclass(frozen=True, slots=True)
class Prequential:
    """How well one encoder predicted: log loss in nats, and share of pairs ranked right (a tie counts half)."""

    encoder: str
    log_loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Contest:
    """A contest and its verdict; `evidence` is the mean gain over its standard error."""

    num_learned: int
    num_judged: int
    active: Prequential
    candidate: Prequential
    gain: float
    evidence: float
    verdict: Verdict
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data; evidence without bound is None."""
        return asdict(self) | {"evidence": self.evidence if math.isfinite(self.evidence) else None}


def num_newest(num_pairs: int) -> int:
    """Return how many of the newest pairs judge and never train: a tenth, and no fewer than can decide."""
    return min(num_pairs, max(math.ceil(num_pairs * NEWEST_SHARE), MIN_JUDGED))


def predict(differences: NDArray[np.float64], weights: NDArray[np.float64], num_judged: int) -> NDArray[np.float64]:
    """Return the predictions that the better answer of each judged pair is the better one.

    Parameters
    ----------
    differences
        Features of the chosen answer minus those of the rejected one, oldest first, shape ``(n, dim)``.
    weights
        How much each pair teaches, shape ``(n,)``.
    num_judged
        Newest pairs that are predicted, each before it is learned.

    Returns
    -------
    numpy.ndarray
        Probabilities, shape ``(num_judged,)``.
    """
    head = BayesianHead.prior(differences.shape[1])
    first_judged = len(differences) - num_judged
    probabilities = np.empty(num_judged)
    for row, (z, weight) in enumerate(zip(differences, weights, strict=True)):
        _, before, _ = head.learn_scored(z, 1.0, float(weight))
        if row >= first_judged:
            probabilities[row - first_judged] = before.p_good
    return probabilities


def compare(
    active: tuple[str, NDArray[np.float64]],
    candidate: tuple[str, NDArray[np.float64]],
    weights: NDArray[np.float64],
    num_judged: int,
) -> Contest:
    """Hold the contest; see :func:`predict` for the arrays, and :func:`judge` for the rule.

    Parameters
    ----------
    active, candidate
        Name and differences of each encoder, of the same pairs.

    Raises
    ------
    InvalidRequestError
        Code ``contest_not_finite``.
    """
    named = {name: predict(z, weights, num_judged) for name, z in (active, candidate)}
    return judge(active[0], named[active[0]], candidate[0], named[candidate[0]], len(weights) - num_judged)


def judge(
    active_name: str,
    active: NDArray[np.float64],
    candidate_name: str,
    candidate: NDArray[np.float64],
    num_learned: int,
) -> Contest:
    """Decide by the predictions of both encoders, shape ``(n,)`` each.

    The candidate wins if its mean log loss is lower by more than :data:`MIN_EVIDENCE` standard errors of the paired
    differences, over at least :data:`MIN_JUDGED` pairs. A tie is no win.

    Raises
    ------
    InvalidRequestError
        Code ``contest_not_finite``.
    """
    if not (np.isfinite(active).all() and np.isfinite(candidate).all()):
        raise InvalidRequestError(
            "A prediction is not a finite number; look for features that are not.", code="contest_not_finite"
        )
    n = len(active)
    gains = _losses(active) - _losses(candidate)
    gains[np.abs(gains) < MIN_DIFFERENCE] = 0.0
    gain = float(gains.mean()) if n else 0.0
    error = float(gains.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    without_spread = math.copysign(math.inf, gain) if gain else 0.0
    evidence = gain / error if error > MIN_DIFFERENCE else without_spread
    verdict, reason = _verdict(n, gain, evidence)
    return Contest(
        num_learned=num_learned,
        num_judged=n,
        active=_summary(active_name, active),
        candidate=_summary(candidate_name, candidate),
        gain=gain,
        evidence=evidence,
        verdict=verdict,
        reason=reason,
    )


def _verdict(n: int, gain: float, evidence: float) -> tuple[Verdict, str]:
    if n < MIN_JUDGED:
        return "too_few", f"{n} pairs to judge by; {MIN_JUDGED} are needed"
    said = f"log loss {abs(gain):.4f} {'lower' if gain > 0 else 'higher'}, {abs(evidence):.2f} standard errors"
    if evidence > MIN_EVIDENCE:
        return "win", said
    return "lose", "no difference" if gain == 0 else f"{said}; {MIN_EVIDENCE} lower are needed"


def _losses(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def _summary(name: str, probabilities: NDArray[np.float64]) -> Prequential:
    if not len(probabilities):
        return Prequential(name, math.nan, math.nan)
    right = np.where(probabilities == 0.5, 0.5, probabilities > 0.5)
    return Prequential(name, float(_losses(probabilities).mean()), float(right.mean()))
