"""Gates and intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.gates import attestation_gate, length_gate, overall, wilson_interval, win_rate_gate
from flows.demo import difference_interval


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_and_stays_in_range(counts):
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_interval_of_a_known_case():
    # 8 of 10, 95 %: 0.490 to 0.943.
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_difference_interval_of_a_known_case():
    # Newcombe (1998), table II, case (a): 56/70 against 48/80 gives 0.0524 to 0.3339.
    assert difference_interval(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize(
    ("wins", "losses", "verdict"),
    [(30, 2, "pass"), (2, 30, "fail"), (17, 15, "inconclusive"), (0, 0, "inconclusive")],
)
def test_win_rate_verdicts(wins, losses, verdict):
    champion = [0.0] * (wins + losses)
    challenger = [1.0] * wins + [-1.0] * losses
    assert win_rate_gate(challenger, champion).verdict == verdict


def test_an_adapter_that_changes_nothing_fails_and_failure_outweighs_the_rest():
    silent = attestation_gate("base", 0.0, 40)
    assert silent.verdict == "fail"
    assert overall([silent, win_rate_gate([1.0] * 40, [0.0] * 40)]) == "fail"
    assert overall([attestation_gate("base", 0.2, 40), win_rate_gate([], [])]) == "inconclusive"


def test_a_collapsed_length_fails():
    assert length_gate([2, 3, 2], 8, 60).verdict == "fail"
    assert length_gate([20, 30, 25], 8, 60).verdict == "pass"
