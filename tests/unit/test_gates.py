"""Gates and intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.gates import (
    attestation_gate,
    difference_interval,
    length_gate,
    overall,
    skill_gates,
    wilson_interval,
    win_rate_gate,
)


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


def test_a_skill_that_is_lost_fails_though_all_skills_together_gain():
    before = {"sums": [1.0] * 12, "form": [0.0] * 40}
    after = {"sums": [0.0] * 12, "form": [1.0] * 40}
    everything, form, sums = skill_gates(before, after)
    assert (everything.gate, form.gate, sums.gate) == ("skills", "skill form", "skill sums")
    assert everything.value > 0 and everything.verdict == form.verdict == "pass"
    assert sums.value == -1.0 and sums.verdict == "fail" and sums.high < 0


def test_the_more_skills_are_looked_at_the_more_it_takes_to_fail_one():
    before, after = [1.0] * 10 + [0.0] * 2, [1.0] * 5 + [0.0] * 7
    alone = skill_gates({"a": before}, {"a": after})
    among = skill_gates(
        {"a": before} | {f"b{n}": [1.0] for n in range(15)}, {"a": after} | {f"b{n}": [1.0] for n in range(15)}
    )
    assert alone[1].verdict == "fail" and among[1].verdict == "pass" and among[1].value == alone[1].value


def test_without_tasks_nothing_is_known_and_nothing_held():
    assert [g.verdict for g in skill_gates({}, {})] == ["pass"]
