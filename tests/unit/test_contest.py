"""The contest between two encoders: who wins, and on what evidence."""

import math

import numpy as np
import pytest

from infra.errors import InvalidRequestError
from reward.contest import MIN_EVIDENCE, MIN_JUDGED, compare, judge, num_newest, predict


def outcome(active, candidate):
    return judge("frozen", np.asarray(active), "backbone", np.asarray(candidate), 100)


def noisy(p, n=100, spread=0.1, seed=0):
    return np.clip(p + np.random.default_rng(seed).normal(0, spread, n), 0.01, 0.99)


def test_a_candidate_that_predicts_better_wins_and_one_that_predicts_worse_loses():
    better, worse = outcome(noisy(0.6), noisy(0.75, seed=1)), outcome(noisy(0.75), noisy(0.6, seed=1))
    assert better.verdict == "win" and better.gain > 0 and better.evidence > MIN_EVIDENCE
    assert worse.verdict == "lose" and worse.gain < 0
    assert better.candidate.log_loss < better.active.log_loss


def test_a_tie_is_no_win():
    p = noisy(0.7)
    tie = outcome(p, p)
    assert (tie.verdict, tie.gain, tie.evidence, tie.reason) == ("lose", 0.0, 0.0, "no difference")


def test_rounding_does_not_win():
    p = noisy(0.7)
    assert outcome(p, p * (1 + 1e-9)).verdict == "lose"


def test_a_lower_loss_without_enough_evidence_is_no_win():
    gains = np.where(np.arange(100) % 2 == 0, 0.3, -0.25)
    close = outcome(np.full(100, 0.5), 0.5 * np.exp(gains))
    assert 0 < close.evidence < MIN_EVIDENCE and close.verdict == "lose"


def test_the_evidence_is_the_mean_gain_over_its_standard_error():
    gains = np.random.default_rng(3).normal(0.02, 0.1, 64)
    found = outcome(np.full(64, 0.5), 0.5 * np.exp(gains))
    assert math.isclose(found.evidence, gains.mean() / (gains.std(ddof=1) / 8), rel_tol=1e-9)


def test_the_same_gain_on_every_pair_is_evidence_without_bound():
    found = outcome(np.full(40, 0.5), np.full(40, 0.75))
    assert found.verdict == "win" and found.as_dict()["evidence"] is None


def test_too_few_pairs_decide_nothing_however_clear_they_are():
    n = MIN_JUDGED - 1
    assert outcome(np.full(n, 0.1), np.full(n, 0.9)).verdict == "too_few"
    assert outcome([], []).verdict == "too_few"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_predictions_that_are_no_numbers_are_refused(value, side):
    predictions = [noisy(0.6), noisy(0.7)]
    predictions[side][5] = value
    with pytest.raises(InvalidRequestError) as refused:
        outcome(*predictions)
    assert refused.value.code == "contest_not_finite"


def test_a_pair_is_predicted_before_it_is_learned():
    z = np.eye(4) * 3  # no pair says anything about another
    assert predict(z, np.ones(4), 4).tolist() == [0.5] * 4
    assert predict(np.repeat(z[:1], 4, axis=0), np.ones(4), 3).min() > 0.5


def test_features_that_carry_the_preference_win_against_noise():
    random = np.random.default_rng(0)
    told = random.normal(size=(300, 8))
    told[:, 0] = np.abs(told[:, 0])
    found = compare(("noise", random.normal(size=(300, 8))), ("told", told), np.ones(300), 60)
    assert found.verdict == "win" and (found.num_learned, found.num_judged) == (240, 60)
    assert found.candidate.accuracy > 0.8


def test_a_tenth_judges_and_never_fewer_than_can_decide():
    assert [num_newest(n) for n in (10, 60, 300, 1155, 1160)] == [10, 30, 30, 116, 116]
