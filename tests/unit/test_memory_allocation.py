"""The budget is shared as well as it can be, and to the last token."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.memory import allocation


@st.composite
def chunks(draw: st.DrawFn, most_chunks: int = 12, most_tokens: int = 200) -> tuple[np.ndarray, ...]:
    num = draw(st.integers(1, most_chunks))
    importance = draw(st.lists(st.floats(1e-3, 1e4), min_size=num, max_size=num))
    most = draw(st.lists(st.integers(1, most_tokens), min_size=num, max_size=num))
    least = [draw(st.integers(1, each)) for each in most]
    return np.array(importance), np.array(least), np.array(most)


@given(chunks(), st.data())
def test_the_shares_are_optimal_up_to_rounding_and_sum_to_the_budget(
    given_chunks: tuple[np.ndarray, ...], data: st.DataObject
) -> None:
    importance, least, most = given_chunks
    budget = data.draw(st.integers(int(least.sum()), int(most.sum()) + 50))
    shares = allocation.fill(importance, least, most, budget)
    assert shares.sum() == min(budget, most.sum())
    assert (shares >= least).all() and (shares <= most).all()
    # KKT: who could have more and who could have less see the same price, but for the token of rounding.
    gains = importance / (shares + 1)
    losses = importance / np.maximum(shares - 1, 1e-9)
    assert gains[shares < most].max(initial=0.0) <= losses[shares > least].min(initial=np.inf) * (1 + 1e-9)


@settings(max_examples=60)
@given(chunks(most_chunks=4, most_tokens=7), st.data())
def test_whole_shares_are_within_a_token_each_of_the_best_there_are(
    given_chunks: tuple[np.ndarray, ...], data: st.DataObject
) -> None:
    importance, least, most = given_chunks
    budget = data.draw(st.integers(int(least.sum()), int(most.sum())))
    ranges = [range(low, high + 1) for low, high in zip(least, most, strict=True)]
    best = max(
        (allocation.value(importance, np.array(each)), each)
        for each in itertools.product(*ranges)
        if sum(each) == budget
    )[1]
    shares = allocation.fill(importance, least, most, budget)
    assert np.abs(shares - np.array(best)).max() <= 1


@given(chunks(), st.integers(0, 6), st.integers(0, 600))
def test_a_mask_keeps_to_the_budget_with_what_each_kept_chunk_costs_besides(
    given_chunks: tuple[np.ndarray, ...], overhead: int, budget: int
) -> None:
    importance, least, most = given_chunks
    shares = allocation.mask(importance, least, most, overhead, budget)
    kept = shares > 0
    assert shares.sum() + overhead * kept.sum() <= budget
    assert (shares[kept] >= least[kept]).all() and (shares <= most).all()


def test_the_more_important_has_more() -> None:
    shares = allocation.fill(np.array([1.0, 3.0]), np.array([2, 2]), np.array([100, 100]), 40)
    assert shares.tolist() == [10, 30]
