"""Sharing a budget of tokens among chunks: water-filling with bounds, then whole tokens."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


def fill(importance: Numbers, least: Counts, most: Counts, budget: int) -> Counts:
    """Share `budget` so that the sum of importance times log(tokens) is as large as it can be.

    At the optimum each has ``level * importance``, or the bound that this meets; the level is found exactly, at the
    breakpoints where a chunk meets a bound. Whole tokens come by the largest remainders.

    Parameters
    ----------
    importance
        Positive, shape (n,).
    least, most
        Bounds of each share in tokens, 1 <= least <= most, shape (n,).
    budget
        At least the sum of `least`.

    Returns
    -------
    array of int, shape (n,)
        Shares within their bounds; their sum is the budget, or that of `most` where it is smaller.
    """
    budget = min(budget, int(most.sum()))
    if budget < least.sum():
        raise ValueError(f"A budget of {budget} is less than the least shares, {least.sum()}.")
    if len(importance) == 0:
        return least.copy()
    level = _level(importance, least, most, budget)
    exact = np.clip(level * importance, least, most)
    return _whole(exact, most, budget)


def _level(importance: Numbers, least: Counts, most: Counts, budget: int) -> float:
    """Return the level at which the clipped shares sum to the budget."""
    points = np.sort(np.concatenate([least / importance, most / importance]))
    low, high = 0, len(points) - 1
    while low < high:  # the first breakpoint at which the sum reaches the budget
        middle = (low + high) // 2
        if _sum_at(points[middle], importance, least, most) < budget:
            low = middle + 1
        else:
            high = middle
    top = float(points[low])
    if low == 0:
        return top
    bottom = float(points[low - 1])
    at_bottom = _sum_at(bottom, importance, least, most)
    at_top = _sum_at(top, importance, least, most)
    if at_top <= at_bottom:
        return top
    return bottom + (top - bottom) * (budget - at_bottom) / (at_top - at_bottom)  # it is linear between two points


def _sum_at(level: float, importance: Numbers, least: Counts, most: Counts) -> float:
    """Return the sum of the shares at a level; np.clip takes three times as long for a few dozen."""
    return float(np.minimum(np.maximum(level * importance, least), most).sum())


def _whole(exact: Numbers, most: Counts, budget: int) -> Counts:
    """Round shares to whole tokens that sum to the budget, the largest remainders first."""
    shares = np.floor(exact + 1e-9).astype(np.int64)
    missing = budget - int(shares.sum())
    order = np.argsort(-(exact - shares), kind="stable")
    for at in order[shares[order] < most[order]][: max(missing, 0)]:
        shares[at] += 1
    return shares


def value(importance: Numbers, shares: Counts) -> float:
    """Return what a way of sharing is worth; a chunk that is left out adds nothing."""
    kept = shares > 0
    return float((importance[kept] * np.log(shares[kept])).sum())


def mask(importance: Numbers, least: Counts, most: Counts, overhead: int, budget: int) -> Counts:
    """Choose which chunks to keep, and share the budget among them.

    They are taken in the order of importance per token of their least share, for as long as the best way of sharing
    gets better by it. What would not fit is passed over.

    Parameters
    ----------
    overhead
        Tokens that each kept chunk costs besides its share.

    Returns
    -------
    array of int, shape (n,)
        Shares in tokens; 0 for what is left out.
    """
    order = np.argsort(-importance * np.log(least + 1.0) / (least + overhead), kind="stable")
    kept: list[int] = []
    used = 0
    for at in order:
        if used + least[at] + overhead <= budget:
            kept.append(int(at))
            used += int(least[at]) + overhead
    shares = np.zeros(len(importance), np.int64)
    num = _best_number(importance, least, most, overhead, budget, kept)
    if num:
        best = np.array(kept[:num])
        shares[best] = fill(importance[best], least[best], most[best], budget - overhead * num)
    return shares


def _best_number(
    importance: Numbers, least: Counts, most: Counts, overhead: int, budget: int, kept: list[int]
) -> int:
    """Return how many of the candidates, in their order, are best to keep: the worth has one peak in practice."""

    @cache
    def worth(num: int) -> float:
        if num == 0:
            return 0.0
        chosen = np.array(kept[:num])
        return value(
            importance[chosen],
            fill(importance[chosen], least[chosen], most[chosen], budget - overhead * num),
        )

    low, high = 0, len(kept)
    while low < high:  # of two neighbours the better one tells on which side the peak is
        middle = (low + high) // 2
        if worth(middle) < worth(middle + 1):
            low = middle + 1
        else:
            high = middle
    return low
