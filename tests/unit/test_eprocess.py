"""The e-process that decides canaries: its mean under the null, and what it finds."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ville import BettingTest

from deploy.eprocess import CHAMPION_RATES, EFFECTS, LARGE_EFFECTS, HigherRate, interval, log_ratios, nearest_null

rates = st.floats(0.0, 1.0)
ratios = st.sampled_from([1, 3, 19])
margins = st.sampled_from([0.0, 0.02, 0.15, 0.25])


def mean_of_a_block(num_a, margin, p_a, p_b):
    """Return the mean of each pair's likelihood ratio over all outcomes of a block."""
    table = log_ratios(num_a, margin, EFFECTS + LARGE_EFFECTS)
    total = 0.0
    for yes, challenger in product(range(num_a + 1), (0, 1)):
        counts = np.array([yes, num_a - yes, challenger, 1 - challenger])
        champion = math.comb(num_a, yes) * p_a**yes * (1 - p_a) ** (num_a - yes)
        probability = champion * (p_b if challenger else 1 - p_b)
        total = total + probability * np.exp(counts @ table)
    return total


@given(ratios, margins, rates, rates)
@settings(max_examples=300)
def test_a_block_is_an_e_variable_for_every_pair_of_rates_in_the_null(num_a, margin, p_a, x):
    p_b = x * min(p_a + margin, 1.0)
    assert np.all(mean_of_a_block(num_a, margin, p_a, p_b) <= 1 + 1e-9)


@given(ratios, margins, st.sampled_from(CHAMPION_RATES), st.floats(0.05, 0.95))
def test_the_nearest_null_is_nearer_than_its_neighbours(num_a, margin, a, x):
    b = a + margin + x * (1 - a - margin) * 0.99
    if not a + margin < b < 1:
        return

    def divergence(p):
        def kl(r, s):
            return r * np.log(r / s) + (1 - r) * np.log((1 - r) / (1 - s))

        return num_a * kl(a, p) + kl(b, p + margin)

    p = nearest_null(a, b, num_a, margin)
    for step in (-1e-3, 1e-3):
        if p + step > 0 and p + step + margin < 1:
            assert divergence(p) <= divergence(p + step) + 1e-12


def counts_of(champion, challenger):
    return np.array(
        [sum(champion), len(champion) - sum(champion), sum(challenger), len(challenger) - sum(challenger)], float
    )


def test_a_mixture_of_products_is_what_log_e_returns():
    process = HigherRate([1])
    counts = np.array([3.0, 4.0, 6.0, 1.0])
    by_hand = np.log(np.mean([np.exp(counts @ column) for column in log_ratios(1, 0.0).T]))
    assert process.log_e(counts) == pytest.approx(by_hand)


def test_blocks_of_other_ratios_multiply():
    process = HigherRate([3, 1])
    three, one = np.array([2.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0])
    counts = np.zeros(8)
    counts[process.columns(3)], counts[process.columns(1)] = three, one
    logs = three @ log_ratios(3, 0.0) + one @ log_ratios(1, 0.0)
    assert process.log_e(counts) == pytest.approx(np.log(np.mean(np.exp(logs))))


def test_a_margin_forgives_what_is_within_it():
    worse_by_ten_points = counts_of([1] * 100 + [0] * 900, [1] * 200 + [0] * 800)
    assert HigherRate([1], 0.0).log_e(worse_by_ten_points) > np.log(1000)
    assert HigherRate([1], 0.25).log_e(worse_by_ten_points) < 0


def test_the_interval_holds_the_difference_and_narrows():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1000):
        low, high = interval(counts_of(rng.random(n) < 0.6, rng.random(n) < 0.7), [1], 0.05)
        assert low < 0.1 < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_beside_ville_it_finds_the_same_and_keeps_nobody_waiting_as_long():
    """Bets on bounded differences test the same null; theirs are tuned for one size of effect."""
    rng = np.random.default_rng(3)
    stops = []
    for _ in range(60):
        champion, challenger = rng.random(3000) < 0.7, rng.random(3000) < 0.8
        counts = np.cumsum(np.stack([champion, ~champion, challenger, ~challenger], axis=1), axis=0)
        differences = challenger * 1.0 - champion
        theirs = BettingTest(0.0, bounds=(-1.0, 1.0), alternative="greater").fit(differences).log_e_values_
        ours = HigherRate([1]).log_e(counts.astype(float))
        reached = [log_e >= np.log(20) for log_e in (ours, theirs)]
        assert reached[0].any()
        stops.append([int(np.argmax(r)) if r.any() else len(r) for r in reached])
    ours, theirs = np.median(stops, axis=0)
    assert 0.5 < ours / theirs < 1.5
    slow_ours, slow_theirs = np.quantile(stops, 0.9, axis=0)
    assert slow_ours < slow_theirs
