"""Who counts for how much: reliability, caps, bursts of fresh accounts."""

import dataclasses

import pytest

from feedback.addresses import block_of
from reward.bursts import MAX_COHORTS, Bursts
from reward.raters import CROWD, Rater, Raters
from tests.unit.test_learner import fresh, rows, say

DAY_S = 86_400.0


def test_one_loud_rater_and_one_loud_address_count_less_and_less():
    raters = Raters()
    for n in range(2 * CROWD):
        for _ in range(4):
            raters.weigh(raters.get(f"quiet-{n}"))
    weights = [raters.weigh(raters.get("loud")) for _ in range(100)]
    assert weights[4] == 1.0 and weights[99] < 0.25
    block = [raters.weigh(raters.get(f"swarm-{n}", "8.8.8.0/24")) for n in range(200)]
    assert block[1] <= 0.5 and block[199] < 0.15
    assert raters.weigh(raters.get("program:tests")) == 1.0


def test_in_a_small_house_nobody_is_too_loud():
    raters = Raters()
    raters.weigh(raters.get("bob"))
    assert {raters.weigh(raters.get("ada")) for _ in range(300)} == {1.0}


def test_who_only_asks_is_no_part_of_the_crowd():
    raters = Raters()
    for n in range(3 * CROWD):
        raters.get(f"asks-{n}").num_seen += 1
    assert {raters.weigh(raters.get("ada")) for _ in range(300)} == {1.0}


def test_a_pool_known_to_be_wrong_is_set_aside_before_it_is_checked_itself():
    raters = Raters()
    for n in range(30):
        rater = raters.get(f"fresh-{n}")
        raters.weigh(rater)
        raters.check(rater, right=False)
    assert raters.weigh(raters.get("yet-another")) == 0.0
    old = Rater("old", num_votes=4, num_right=3)
    raters.admit(old)
    assert raters.weigh(old) == 1.0


def test_reliability_is_the_documented_formula():
    raters = Raters()
    ada, bob = (raters.get(name, "8.8.8.0/24") for name in ("ada", "bob"))
    for rater in (ada, bob):
        raters.weigh(rater)
    for right in (True, True, False):
        raters.check(bob, right=right)
    pool = (8 + 1 + 1 / 2) / (10 + 1 + 1 / 2 + 1 / 3)
    assert raters.reliability(ada) == pytest.approx((4 * pool + 2 / 2) / (4 + 3 / 2))
    assert raters.reliability(bob) == pytest.approx((4 * pool + 2) / (4 + 3))


def test_too_loud_is_three_times_the_mean_of_the_others_and_more_for_who_was_right():
    raters = Raters()
    for n in range(CROWD):
        for _ in range(10):
            raters.weigh(raters.get(f"quiet-{n}"))
    loud = [raters.weigh(raters.get("loud")) for _ in range(31)]
    assert loud[3:30] == [1.0] * 27 and loud[30] < 0.5
    raters.get("right").num_right = 1
    right = [raters.weigh(raters.get("right")) for _ in range(70)]
    assert right[:60] == [1.0] * 60 and right[69] < 0.5


def test_who_was_right_once_is_fresh_no_longer():
    assert Rater("new", num_votes=2).is_fresh and not Rater("old", num_votes=3).is_fresh
    assert not Rater("right", num_votes=1, num_right=1).is_fresh
    assert not Rater("cleared", num_votes=1, ruling="cleared").is_fresh


def test_a_restart_changes_nobodys_weight():
    raters = Raters()
    for n in range(3 * CROWD):
        rater = raters.get(f"rater-{n}", f"8.8.{n % 7}.0/24" if n % 3 else None, float(n))
        for _ in range(n % 9):
            raters.weigh(rater)
        if n % 4 == 0:
            raters.check(rater, right=n % 8 == 0)
    again = Raters(raters.pools)
    for rater in raters.by_name.values():
        again.admit(dataclasses.replace(rater))
    assert again.blocks == raters.blocks
    for name in list(raters.by_name):
        assert again.weigh(again.get(name)) == raters.weigh(raters.get(name))
    assert again.num_established == raters.num_established


def test_a_burst_of_fresh_accounts_is_held_and_what_came_before_it_too():
    learner, kept = fresh()
    now, z = 1.7e9, rows(400, seed=4)
    for n in range(6 * CROWD):
        say(learner, kept, f"old-{n}", f"old-{n % CROWD}", z[n], at_s=now + 1_000.0 * n)
    now += 1_000.0 * 6 * CROWD
    for n in range(60):
        say(learner, kept, f"new-{n}", f"new-{n}", z[200 + n], 0.0, at_s=now + n)
    raters = learner.raters.by_name
    names = {rater.quarantine for rater in raters.values() if rater.name.startswith("new")}
    assert len(names) == 1 and None not in names
    assert all(change.action == "hold" for n in range(60) for change in kept.of_rater(f"new-{n}"))
    assert not any(raters[f"old-{n}"].quarantine for n in range(CROWD))
    released = learner.rule([r.name for r in raters.values() if r.quarantine], None, kept)
    assert sum(change.action == "add" for change in released) == 60


def test_in_a_small_house_new_people_are_no_burst():
    learner, kept = fresh()
    z = rows(300, seed=4)
    for n in range(200):
        say(learner, kept, f"old-{n}", f"old-{n % (CROWD - 1)}", z[n], at_s=1.7e9 + 1_000.0 * n)
    for n in range(60):
        say(learner, kept, f"new-{n}", f"new-{n}", z[200 + n], 0.0, at_s=1.7e9 + 200_000.0 + n)
        if learner.raters.num_established >= CROWD:
            break
    assert not any(rater.quarantine for rater in learner.raters.by_name.values())


def test_a_slow_trickle_of_new_people_is_no_burst():
    bursts = Bursts()
    assert not any(bursts.fresh_voted(None, 1e9 + 300.0 * n, f"qu_{n}") for n in range(2_000))


def test_on_the_first_day_everybody_is_new():
    bursts = Bursts()
    assert not any(bursts.fresh_voted(None, 1e9 + n, f"qu_{n}") for n in range(2_000))


def test_a_house_where_many_are_new_all_the_time_has_no_burst():
    bursts = Bursts()
    # 40 votes in ten minutes, always.
    assert not any(bursts.fresh_voted(None, 1e9 + 15.0 * n, f"qu_{n}") for n in range(12_000))


def test_on_a_busy_hour_of_everybody_new_people_are_no_burst():
    quiet, busy = Bursts(), Bursts()
    for bursts in (quiet, busy):
        bursts.fresh_voted(None, 1e9, "qu_first")
    held = {"quiet": 0, "busy": 0}
    for n in range(60):
        now = 1e9 + 2 * DAY_S + n
        for _ in range(2):
            busy.established_voted(now)
        held["quiet"] += quiet.fresh_voted(None, now, f"qu_{n}") is not None
        held["busy"] += busy.fresh_voted(None, now, f"qu_{n}") is not None
    assert held["quiet"] > 20 and held["busy"] == 0


def test_a_burst_ends():
    bursts = Bursts()
    bursts.fresh_voted(None, 1e9, "qu_first")
    now = 1e9 + 2 * DAY_S
    found = [bursts.fresh_voted("8.8.8.0/24", now + n, f"qu_{n}") for n in range(60)]
    assert found[-1] is not None and {name for hit in found if hit for name in hit} & {"8.8.8.0/24"}
    assert bursts.fresh_voted("8.8.8.0/24", now + 7_200.0, "qu_later") is None


def test_addresses_are_not_kept_without_bound():
    bursts = Bursts()
    for n in range(2 * MAX_COHORTS):
        bursts.fresh_voted(f"block-{n}", 1e9 + n, f"qu_{n}")
    assert len(bursts.cohorts) <= MAX_COHORTS + 2


@pytest.mark.parametrize(
    ("address", "block"),
    [("8.8.4.4", "8.8.4.0/24"), ("2001:4860:4860::8888", "2001:4860:4860::/48"), ("10.0.0.1", None), ("x", None)],
)
def test_only_public_addresses_have_a_block(address, block):
    assert block_of(address) == block
