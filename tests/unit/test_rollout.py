"""The canary as a state machine: steps, decisions, guardrails, holds, the budget; refusals; assignment."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.head import unit_interval
from deploy.refusals import is_refusal
from deploy.rollout import BETTER, MAX_RATIO, WORSE, Event, Guardrail, Plan, Rollout, replay

FAILED = Guardrail(name="failed", margin=0.02, alpha_share=0.1)


def plan(**options):
    defaults = {
        "steps": (0.5,),
        "alpha": 0.1,  # of which the first candidate has half
        "candidate": 1,
        "step_users": 3,
        "step_s": 0.0,
        "max_s": 1000.0,
        "guardrails": (FAILED,),
    }
    return Plan(**(defaults | options))


def votes(champion, challenger, at_s=0.0):
    """Return a trial and a vote of each user, arm by arm in turn."""
    events = []
    for pair in zip(champion, challenger, strict=True):
        for arm, good in zip(("champion", "challenger"), pair, strict=True):
            events += [Event(at_s, "trial", arm), Event(at_s, "vote", arm, good=bool(good))]
    return events


def draw(rate, n, seed):
    return np.random.default_rng(seed).random(n) < rate


def test_a_better_challenger_is_promoted_a_worse_one_rolled_back():
    low, high = draw(0.15, 200, 1), draw(0.6, 200, 2)
    better, worse = replay(plan(), votes(low, high)), replay(plan(), votes(high, low))
    assert (better.decision, better.because) == ("promote", BETTER)
    assert (worse.decision, worse.because) == ("rollback", WORSE)
    assert better.tests[BETTER].highest >= 20 and worse.tests[WORSE].highest >= worse.plan.limit(WORSE)


def test_without_votes_or_without_traffic_it_holds():
    one_sided = [Event(1.0, "vote", "challenger", good=True) for _ in range(200)]
    assert replay(plan(), one_sided).decision is None
    assert replay(plan(), []).decision is None


def test_no_promotion_before_enough_users_have_met_it():
    bad, good = [0] * 12, [1] * 12
    assert replay(plan(), votes(bad, good)).decision == "promote"
    assert replay(plan(step_users=13), votes(bad, good)).decision is None


def test_out_of_time_it_ends_without_promotion():
    ended = replay(plan(), [Event(999.0, "tick"), Event(1000.0, "tick"), *votes([0] * 30, [1] * 30, 1001.0)])
    assert (ended.decision, ended.because) == ("expired", "time")


def test_a_guardrail_rolls_back_what_people_like():
    events = []
    for number in range(40):
        flags = frozenset({"failed"} if number % 2 else ())
        events += [Event(0.0, "trial", "champion"), Event(0.0, "trial", "challenger", flags)]
    ended = replay(plan(), [*votes([1] * 3, [1] * 3), *events])
    assert (ended.decision, ended.because) == ("rollback", "failed")
    assert "guardrail failed" in ended.sentence()


def test_what_happens_as_often_to_the_champions_users_is_no_harm():
    both = [
        Event(0.0, "trial", arm, frozenset({"failed"})) for _ in range(300) for arm in ("champion", "challenger")
    ]
    assert replay(plan(), both).decision is None


def test_steps_go_up_with_users_and_time_and_not_in_doubt():
    three = plan(steps=(0.05, 0.25, 0.5), step_s=10.0)
    users = [Event(1.0, "trial", "challenger") for _ in range(30)]
    rollout = replay(three, [*users, Event(1.0, "tick")])
    assert rollout.share == 0.05  # enough users, too soon
    assert not rollout.is_due(9.0) and rollout.is_due(10.0)
    rollout.apply(Event(10.0, "tick"))
    assert rollout.share == 0.25
    rollout.apply(Event(30.0, "tick"))
    assert rollout.share == 0.25  # time alone is not enough
    for event in [*votes([1] * 3, [1] * 3, 40.0), Event(40.0, "tick")]:
        rollout.apply(event)
    assert rollout.share == 0.5
    doubtful = replay(three, [*users, *([Event(2.0, "vote", "champion", good=True)] * 200)])
    while doubtful.tests[WORSE].e <= math.sqrt(doubtful.tests[WORSE].limit):
        doubtful.apply(Event(3.0, "vote", "challenger", good=False))
    doubtful.apply(Event(100.0, "tick"))
    assert doubtful.decision is None and doubtful.share == 0.05


def test_one_of_the_challengers_trials_stands_beside_as_many_as_the_share_says():
    assert [plan(steps=(share,)).ratio(0) for share in (0.05, 0.25, 0.5, 0.9)] == [19, 3, 1, 1]
    assert plan(steps=(0.001,)).ratio(0) == MAX_RATIO
    rollout = replay(plan(steps=(0.25,)), [Event(0.0, "vote", "champion", good=True)] * 5)
    rollout.apply(Event(0.0, "vote", "challenger", good=True))
    assert rollout.num_pairs == 1
    rollout.apply(Event(0.0, "vote", "challenger", good=True))
    assert rollout.num_pairs == 1  # two of the champion's votes are left, three are needed


def test_more_of_the_champions_votes_beside_one_make_it_decide_sooner():
    def pairs(share):
        ratio, found = plan(steps=(share,)).ratio(0), []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            rollout = Rollout(plan(steps=(share,)))
            while rollout.decision is None:
                for good in rng.random(ratio) < 0.5:
                    rollout.apply(Event(0.0, "vote", "champion", good=bool(good)))
                rollout.apply(Event(0.0, "trial", "challenger"))
                rollout.apply(Event(0.0, "vote", "challenger", good=bool(rng.random() < 0.8)))
            found.append(rollout.num_pairs)
        return np.median(found)

    assert pairs(0.05) < 0.8 * pairs(0.5)


def test_held_it_counts_on_and_decides_when_it_is_resumed():
    events = [Event(0.0, "hold"), *votes([0] * 12, [1] * 12)]
    held = replay(plan(), events)
    assert held.decision is None and held.num_pairs == 12 and "held" in held.sentence()
    held.apply(Event(5.0, "resume"))
    assert held.decision == "promote"


def test_harm_ends_a_promotion_that_waits_for_an_operator_and_nothing_ends_a_rollback():
    waiting = replay(plan(), votes([0] * 12, [1] * 12))
    assert waiting.decision == "promote"
    for event in votes([1] * 60, [0] * 60):
        waiting.apply(event)
    assert waiting.decision == "rollback"
    for event in votes([0] * 400, [1] * 400):
        waiting.apply(event)
    assert waiting.decision == "rollback"


def test_candidates_in_a_row_never_spend_more_than_alpha_in_all():
    spent = [plan(candidate=number).candidate_alpha for number in range(1, 2000)]
    assert spent[:3] == pytest.approx([0.05, 0.1 / 6, 0.1 / 12]) and sum(spent) < 0.1
    first = plan(guardrails=(FAILED, Guardrail(name="slow", margin=0.1, alpha_share=0.3)))
    parts = [1 / first.limit(name) for name in (WORSE, "failed", "slow")]
    assert sum(parts) == pytest.approx(0.05) and 1 / first.limit(BETTER) == pytest.approx(0.05)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.sampled_from([0.05, 0.25, 0.5]))
@settings(max_examples=40)
def test_the_same_events_give_the_same_decision_however_they_are_cut(seed, p_a, p_b, share):
    rng = np.random.default_rng(seed)
    events = []
    for number in range(120):
        arm = "challenger" if rng.random() < share else "champion"
        flags = frozenset({"failed"} if rng.random() < 0.05 else ())
        events.append(Event(float(number), "trial", arm, flags))
        events.append(
            Event(float(number), "vote", arm, good=bool(rng.random() < (p_b if arm != "champion" else p_a)))
        )
    whole = replay(plan(steps=(share,)), events)
    parts = replay(plan(steps=(share,)), events[:77])
    for event in events[77:]:
        parts.apply(event)
    assert whole.evidence() == parts.evidence() and whole.sentence() == parts.sentence()
    again = Plan.model_validate(whole.plan.model_dump(mode="json"))
    assert replay(again, events).evidence() == whole.evidence()


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("I am unable to open links.", True),
        ("It’s inappropriate to say so.", True),
        ("Sorrow is a feeling. A can opener opens cans.", False),
        ("Boil the egg for eight minutes. " * 20 + "I cannot say more.", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(answer, refuses):
    assert is_refusal(answer) is refuses


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


def test_who_has_waited_for_ten_blocks_is_left_out_so_that_drift_harms_nobody():
    """Both arms are as good at every moment, and the moments change; one arm has nine users of ten."""
    decisions = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rollout = Rollout(plan(steps=(0.9,), alpha=0.05))
        for number in range(3000):
            arm = "challenger" if rng.random() < 0.9 else "champion"
            good = bool(rng.random() < 0.8 - 0.3 * number / 3000)
            rollout.apply(Event(0.0, "trial", arm))
            rollout.apply(Event(0.0, "vote", arm, good=good))
        decisions.append(rollout.decision)
    assert sum(decision is not None for decision in decisions) <= 4  # 5 % of 40, and two standard errors
    assert len(rollout.votes.waiting["challenger"]) <= 10


def test_time_ends_a_decision_that_nobody_acted_on():
    waiting = replay(plan(), votes([0] * 12, [1] * 12))
    assert waiting.decision == "promote" and not waiting.is_due(999.0) and waiting.is_due(1000.0)
    waiting.apply(Event(1000.0, "tick"))
    assert waiting.decision == "expired"


def test_steps_must_rise():
    with pytest.raises(ValueError, match="rise"):
        plan(steps=(0.5, 0.05))
