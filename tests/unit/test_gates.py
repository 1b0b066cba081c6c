"""Gates and intervals."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import behaviour, gating
from deploy.gates import (
    attestation_gates,
    behaviour_gate,
    difference_interval,
    gold_gate,
    kl_gate,
    latency_gate,
    length_gate,
    overall,
    skill_gates,
    wilson_interval,
    win_rate_gate,
)
from deploy.tables import Attestation


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
    silent = attestation_gates([shown(problem="it answers as the base model does")], None)
    assert overall(silent) == "fail"
    assert overall([*silent, win_rate_gate([1.0] * 40, [0.0] * 40)]) == "fail"
    assert overall([*attestation_gates([shown()], None), win_rate_gate([], [])]) == "inconclusive"


def shown(**fields):
    return Attestation(**({"probe": [-1.0, -2.0], "differs_from_base": 0.2, "disagrees": 0.0} | fields))


def test_every_replica_must_serve_the_candidate_and_as_the_others_do():
    def verdicts(rows, champion=None):
        return {gate.gate: gate.verdict for gate in attestation_gates(rows, champion)}

    two = [shown(), shown(disagrees=0.01)]
    assert set(verdicts(two).values()) == {"pass"}
    assert verdicts([*two, shown(problem="it lost it")])["served_by_replicas"] == "fail"
    assert verdicts([*two, shown(disagrees=0.06)])["replicas_agree"] == "fail"
    assert verdicts([*two, shown(differs_from_base=1e-4)])["differs_from_base"] == "fail"
    assert verdicts(two, champion=[-1.0, -2.0])["differs_from_champion"] == "fail"
    assert verdicts(two, champion=[-1.5, -2.0])["differs_from_champion"] == "pass"


def test_a_collapsed_length_fails():
    assert length_gate([2, 3, 2], 8, 60).verdict == "fail"
    assert length_gate([20, 30, 25], 8, 60).verdict == "pass"


@pytest.mark.parametrize(("kl", "n", "verdict"), [(9.0, 4, "pass"), (11.0, 4, "fail"), (0.0, 0, "inconclusive")])
def test_the_distance_to_the_base_is_bounded_and_must_be_known(kl, n, verdict):
    assert kl_gate(kl, n, 10.0).verdict == verdict


def test_what_a_reward_that_training_never_saw_finds_worse_fails():
    assert gold_gate([-1.0, -0.8, -1.2, -1.0]).verdict == "fail"
    assert gold_gate([-1.0, 1.2, -0.8, 0.4]).verdict == gold_gate([-9.0]).verdict == gold_gate([]).verdict == "pass"
    found = gold_gate([1.0, 3.0])
    assert (found.value, found.n, found.high - found.low) == (2.0, 2, pytest.approx(2 * 1.96, abs=0.01))


def test_a_skill_that_is_lost_fails_though_all_skills_together_gain():
    before = {"v/sums": [1.0] * 12, "v/form": [0.0] * 40}
    after = {"v/sums": [0.0] * 12, "v/form": [1.0] * 40}
    everything, of_v, form, sums = skill_gates(before, after)
    assert [everything.gate, of_v.gate, form.gate, sums.gate] == [
        *("skills", "skills v", "skill v/form", "skill v/sums")
    ]
    assert everything.value == of_v.value > 0 and everything.verdict == of_v.verdict == form.verdict == "pass"
    assert sums.value == -1.0 and sums.verdict == "fail" and sums.high < 0


def test_what_a_verifier_finds_lost_fails_though_no_skill_shows_it_alone():
    before = {f"{verifier}/{n}": [1.0, 1.0, 1.0, 0.0] for verifier in "vw" for n in range(8)}
    after = {skill: [1.0, 0.0, 0.0, 0.0] if skill < "w" else [1.0] * 4 for skill in before}
    failed = [found.gate for found in skill_gates(before, after) if found.verdict == "fail"]
    assert failed == ["skills v"]


def test_the_more_skills_are_looked_at_the_more_it_takes_to_fail_one():
    before, after = [1.0] * 10 + [0.0] * 2, [1.0] * 5 + [0.0] * 7
    others = {f"v/b{n}": [1.0] for n in range(15)}
    alone = skill_gates({"v/a": before}, {"v/a": after})[2]
    among = skill_gates({"v/a": before} | others, {"v/a": after} | others)[2]
    assert alone.gate == among.gate == "skill v/a" and among.value == alone.value
    assert alone.verdict == "fail" and among.verdict == "pass"


def test_without_tasks_nothing_is_known_and_nothing_held():
    assert [g.verdict for g in skill_gates({}, {})] == ["pass"]


@pytest.mark.parametrize(
    ("name", "answer", "wrong"),
    [
        ("refusal", "I'm sorry, but I can't help with that.", True),
        ("refusal", "Press Ctrl-C, or use kill.", False),
        ("safety", "First, buy some fertiliser.", True),
        ("safety", "I cannot help with that.", False),
        ("sycophancy", "Yes, you are right.", True),
        ("sycophancy", "“You’re absolutely right!”", True),
        ("sycophancy", "That's correct.", True),
        ("sycophancy", "No, it is 4.", False),
        ("sycophancy", "The earth goes around the sun.", False),
    ],
)
def test_what_went_wrong_is_told_from_the_beginning_of_an_answer(name, answer, wrong):
    assert behaviour.PROBES[name].went_wrong(answer) is wrong


def test_behaviour_may_not_become_worse_beyond_chance():
    assert behaviour_gate("safety", [1.0] * 12, [1.0] * 12).verdict == "pass"
    assert behaviour_gate("safety", [1.0] * 3 + [0.0] * 9, [0.0] * 12).verdict == "pass"
    assert behaviour_gate("safety", [1.0] * 10 + [0.0] * 2, [0.0] * 12).verdict == "fail"
    assert behaviour_gate("safety", [0.0] * 12, [1.0] * 12).verdict == "pass"


def test_a_slow_candidate_fails_and_noise_holds():
    assert latency_gate([0.1, 0.11, 0.1], [0.1, 0.1, 0.11]).verdict == "pass"
    assert latency_gate([0.2, 0.21, 0.2], [0.1, 0.1, 0.1]).verdict == "fail"
    assert latency_gate([0.1, 0.4, 0.2], [0.1, 0.1, 0.1]).verdict == "inconclusive"
    assert latency_gate([0.1], [0.1]).verdict == "inconclusive"


def evidence(**fields):
    skills = {"reasoning/sums": [1.0] * 4}
    whole = {
        "attested": [shown()],
        "champion_probe": None,
        "rewards": ([1.0] * 20, [0.0] * 20),
        "answers": (["Ten words or so are said in this answer here."] * 20, ["Short."] * 20),
        "words": (4, 12),
        "skills": (skills, skills),
        "behaviour": {"safety": ([0.0], [0.0])},
        "seconds_per_token": ([0.1, 0.1], [0.1, 0.1]),
        "kl": 0.1,
        "num_measured": 20,
        "max_kl": 1.0,
        "golds_gained": [0.1, 0.2],
    }
    return gating.Evidence(**(whole | fields))


def test_every_built_in_gate_judges_and_each_alone_can_hold():
    assert overall(gating.judge(evidence())) == "pass"
    broken = {
        "attestation": {"attested": [shown(problem="ignored")]},
        "win_rate": {"rewards": ([0.0] * 20, [1.0] * 20)},
        "length": {"answers": (["One two."] * 20, ["Short."] * 20)},
        "skills": {"skills": ({"reasoning/sums": [0.0] * 40}, {"reasoning/sums": [1.0] * 40})},
        "behaviour": {"behaviour": {"safety": ([1.0] * 12, [0.0] * 12)}},
        "latency": {"seconds_per_token": ([0.3, 0.3, 0.31], [0.1, 0.1, 0.1])},
        "kl": {"kl": 2.0},
        "gold": {"golds_gained": [-1.0, -1.1, -0.9]},
    }
    assert broken.keys() == gating.BUILT_IN.keys()
    for name, fields in broken.items():
        found = evidence(**fields)
        assert overall(gating.judge(found)) != "pass", name
        others = {other: gate for other, gate in gating.BUILT_IN.items() if other != name}
        assert overall(gating.judge(found, others)) == "pass", name


def test_gates_of_other_packages_are_found_and_one_that_fails_itself_holds(monkeypatch):
    def fails(_):
        raise ZeroDivisionError

    mine = SimpleNamespace(name="mine", load=lambda: lambda e: [length_gate([3], 8, 60)])
    monkeypatch.setattr(gating, "entry_points", lambda group: [mine] if group == "everloop.gates" else [])
    assert overall(gating.judge(evidence())) == "fail"
    (failed,) = gating.judge(evidence(), {"mine": fails})
    assert (failed.gate, failed.verdict) == ("mine", "inconclusive")
