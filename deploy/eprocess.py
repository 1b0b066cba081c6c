"""An e-process: is a rate higher among the challenger's users than among the champion's, by more than a margin?

Trials are taken in blocks of some of the champion's and some of the challenger's. For a pair of rates with the
challenger's above the null, the likelihood ratio of a block against the nearest pair within the null is an
e-variable: its mean is at most 1 under every pair of rates in the null, since that is a convex set. A mixture
over a fixed grid of such pairs, multiplied along the blocks, is a test martingale under the null. So the chance
that it ever reaches 1/alpha is at most alpha (Ville), whenever and however often one looks, and whatever
decided, from the past, how many trials of each arm make the next block.

References
----------
Turner, Ly and Gruenwald (2024), Generic e-variables for exact sequential k-sample tests that allow for
optional stopping. Journal of Statistical Planning and Inference 230.
Turner and Gruenwald (2023), Exact anytime-valid confidence intervals for contingency tables and beyond.
Statistics and Probability Letters 198 (nulls with a margin).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Rates of the champion, and how far above it (and the margin) the challenger's are, in log-odds.
CHAMPION_RATES = (0.01, 0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
EFFECTS = (0.4, 0.8, 1.6)
LARGE_EFFECTS = (0.8, 1.6, 3.2)
NUM_OUTCOMES = 4  # of a block's trials: champion yes, champion no, challenger yes, challenger no
BISECTIONS = 60


def nearest_null(a: float, b: float, num_a: int, margin: float) -> float:
    """Return the champion's rate p of the pair (p, p + margin) nearest to (a, b), by the divergence of a block.

    Parameters
    ----------
    a, b
        Rates of champion and challenger, with b above a + margin.
    num_a
        The champion's trials in a block; the challenger has one.
    """
    if margin == 0.0:
        return (num_a * a + b) / (num_a + 1)
    low, high = a, min(b - margin, 1.0)  # the divergence is convex in p, falls at a and rises at b - margin
    for _ in range(BISECTIONS):
        p = (low + high) / 2
        q = p + margin
        slope = num_a * (p - a) / (p * (1 - p)) + (q - b) / (q * (1 - q))
        low, high = (p, high) if slope < 0 else (low, p)
    return (low + high) / 2


@cache
def log_ratios(num_a: int, margin: float, effects: tuple[float, ...] = EFFECTS) -> Array:
    """Return the log-likelihood ratios of each outcome under each pair of the grid, shape (4, J).

    Pairs that the margin pushes out of (0, 1) are left out; there are fewer then.
    """
    columns = []
    for a in CHAMPION_RATES:
        for effect in effects:
            if not 0.0 < a + margin < 1.0:
                continue
            b = 1.0 / (1.0 + math.exp(-math.log((a + margin) / (1.0 - a - margin)) - effect))
            p = nearest_null(a, b, num_a, margin)
            q = p + margin
            columns.append(
                [math.log(a / p), math.log((1 - a) / (1 - p)), math.log(b / q), math.log((1 - b) / (1 - q))]
            )
    return np.array(columns).T


class HigherRate:
    """The e-process of the alternative "the challenger's rate is higher, by more than `margin`".

    Parameters
    ----------
    ratios
        How many of the champion's trials may stand in a block beside one of the challenger's.
    margin
        What the challenger's rate may be higher by without being called so.
    effects
        How far above the margin its rate is looked for, in log-odds.
    """

    def __init__(self, ratios: Sequence[int], margin: float = 0.0, effects: tuple[float, ...] = EFFECTS) -> None:
        self.ratios = tuple(sorted(set(ratios)))
        self.table = np.concatenate([log_ratios(ratio, margin, effects) for ratio in self.ratios])

    def columns(self, ratio: int) -> slice:
        """Return where the counts of blocks of a ratio stand."""
        start = NUM_OUTCOMES * self.ratios.index(ratio)
        return slice(start, start + NUM_OUTCOMES)

    def log_e(self, counts: Array) -> Array:
        """Return the log of the e-value after trials.

        Parameters
        ----------
        counts
            Of each ratio's outcomes, shape (..., 4 R).
        """
        logs = counts @ self.table
        highest = logs.max(axis=-1)
        mixed: Array = highest + np.log(np.exp(logs - highest[..., None]).mean(axis=-1))
        return mixed


def interval(counts: Array, ratios: Sequence[int], alpha: float) -> tuple[float, float]:
    """Return bounds of the challenger's rate minus the champion's that hold at every look.

    Margins that the e-process at this moment does not refute at alpha / 2, from either side (on a grid of
    hundredths).

    Parameters
    ----------
    counts
        Of each ratio's outcomes, shape (4 R,), as :class:`HigherRate` has them.
    """
    swapped = counts.reshape(-1, NUM_OUTCOMES)[:, [1, 0, 3, 2]].ravel()  # no for yes: higher becomes lower
    return _highest_refuted(counts, ratios, alpha / 2), -_highest_refuted(swapped, ratios, alpha / 2)


def _highest_refuted(counts: Array, ratios: Sequence[int], alpha: float) -> float:
    refuted = [
        hundredths / 100
        for hundredths in range(-90, 91)
        if HigherRate(ratios, hundredths / 100).log_e(counts) >= -math.log(alpha)
    ]
    return max(refuted, default=-1.0)
