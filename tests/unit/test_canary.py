"""The canary's decision and the assignment of users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.canary import decide, e_processes, pair_e_value
from deploy.head import unit_interval

rates = st.floats(0.02, 0.98)


@given(rates, rates, st.floats(0.0, 1.0))
def test_a_pair_is_an_e_variable_under_every_equal_rate(p_a, p_b, p):
    expectation = sum(
        (p if a else 1 - p) * (p if b else 1 - p) * pair_e_value(a, b, p_a, p_b)
        for a in (False, True)
        for b in (False, True)
    )
    assert expectation <= 1 + 1e-9


@given(rates, rates, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_better_is_an_e_variable_when_the_challenger_is_truly_worse(p_a, p_b, x, y):
    if p_b <= p_a:
        p_a, p_b = p_b, p_a
    true_a, true_b = max(x, y), min(x, y)
    expectation = sum(
        (true_a if a else 1 - true_a) * (true_b if b else 1 - true_b) * pair_e_value(a, b, p_a, p_b)
        for a in (False, True)
        for b in (False, True)
    )
    assert expectation <= 1 + 1e-9


def test_no_false_promotion_beyond_alpha_with_a_look_after_every_vote():
    rng = np.random.default_rng(1)
    n, alpha = 800, 0.05
    wrong = sum(
        decide(list(rng.random(400) < 0.3), list(rng.random(400) < 0.3), alpha).decision == "promote"
        for _ in range(n)
    )
    # Three standard deviations of a binomial at alpha.
    assert wrong / n <= alpha + 3 * (alpha * (1 - alpha) / n) ** 0.5


def test_a_clearly_better_challenger_is_promoted_and_a_worse_one_rolled_back():
    rng = np.random.default_rng(2)
    bad, good = list(rng.random(300) < 0.12), list(rng.random(300) < 0.40)
    assert decide(bad, good, 0.05).decision == "promote"
    assert decide(good, bad, 0.05).decision == "rollback"


def test_without_votes_the_canary_holds():
    evidence = decide([], [True] * 50, 0.05)
    assert evidence.decision == "hold" and evidence.num_pairs == 0
    assert "not decided" in evidence.sentence()


def test_the_estimate_of_a_pair_uses_earlier_pairs_only():
    better, _ = e_processes([False], [True])
    assert better == [1.0, 1.0]


@given(st.integers(1, 10**6), st.text(min_size=1, max_size=40))
def test_assignment_is_sticky(canary_id, user):
    assert unit_interval(canary_id, user) == unit_interval(canary_id, user)
    assert 0 <= unit_interval(canary_id, user) < 1


def test_assignment_follows_the_share_and_is_independent_between_canaries():
    users = [f"u{i}" for i in range(4000)]
    first = np.array([unit_interval(1, u) < 0.2 for u in users])
    second = np.array([unit_interval(2, u) < 0.2 for u in users])
    assert first.mean() == pytest.approx(0.2, abs=0.02)
    assert (first & second).mean() == pytest.approx(0.04, abs=0.012)
