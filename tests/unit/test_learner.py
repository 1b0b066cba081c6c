"""The learner and its guards, without a model or a database."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.addresses import block_of
from feedback.fold import Standing
from flows.bench import attacks
from flows.bench.attacks import Kept
from infra.errors import InvalidRequestError
from infra.settings import Settings
from reward import asking, propensity
from reward.bursts import Bursts
from reward.calibration import Calibration, Reliability, logit
from reward.drift import Adwin
from reward.kinds import Kinds, verdict_of
from reward.learner import Guards, Learner, Observation, Threshold, abstains
from reward.online import BayesianHead, sigmoid
from reward.raters import CROWD, Rater, Raters

DIM = 8


def rows(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, DIM))


def say(learner, kept, name, rater, z, target=1.0, **more):
    kept.raters[name] = rater
    _, _, changes = learner.learn(Observation(name, rater, "thumb", z, target, **more), kept)
    kept.keep(changes)
    return changes


def fresh():
    return Learner(BayesianHead.prior(DIM)), Kept()


def test_who_is_found_unreliable_is_taken_out_and_comes_back_when_reinstated():
    (learner, kept), (without, _) = fresh(), fresh()
    for n, z in enumerate(rows(12)):
        say(learner, kept, f"good-{n}", "ada", z)
        say(learner, kept, f"bad-{n}", "eve", z, 0.0)
    for _ in range(6):
        kept.keep(learner.check("eve", right=False, book=kept))
    for change in kept.of_rater("ada"):
        assert change.action == "add"
        without.head.apply(change.site)
    np.testing.assert_allclose(learner.head.theta, without.head.theta, atol=1e-8)
    np.testing.assert_allclose(learner.head.covariance, without.head.covariance, atol=1e-8)
    held = say(learner, kept, "bad-12", "eve", rows(1)[0], 0.0)
    assert [change.action for change in held] == ["hold"]
    theta = learner.head.theta.copy()
    changes = learner.rule(["eve"], "cleared", kept)
    assert sorted(change.feedback_id for change in changes) == sorted(f"bad-{n}" for n in range(13))
    assert not np.allclose(learner.head.theta, theta)
    learner.rule(["eve"], "banned", kept)
    assert learner.raters.get("eve").set_aside


def test_a_banned_raters_effect_is_gone_also_after_the_posterior_was_widened():
    (learner, kept), (without, _) = fresh(), fresh()
    say(learner, kept, "bad", "eve", rows(1)[0])
    for some in (learner, without):
        some.head.inflate(1.5)
        some.guards.inflation *= 1.5
    kept.keep(learner.rule(["eve"], "banned", kept))
    np.testing.assert_allclose(learner.head.theta, without.head.theta, atol=1e-9)
    np.testing.assert_allclose(learner.head.covariance, without.head.covariance, atol=1e-9)


@pytest.mark.parametrize("attack", ["45", "swarm"])
def test_raters_who_flip_their_votes_together_move_little(attack):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=DIM)
    z = rng.normal(size=(1_200, DIM))
    z *= np.sign(z @ truth + rng.logistic(scale=1.0, size=1_200))[:, None]  # learnable, and not easy
    cast = {name: attacks.votes(name, 1_200, 1) for name in ("clean", attack)}
    clean = attacks.accuracy(z, cast["clean"], guarded=True)
    guarded = attacks.accuracy(z, cast[attack], guarded=True)
    unguarded = attacks.accuracy(z, cast[attack], guarded=False)
    # 600 pairs are judged, the same ones each time.
    assert guarded > clean - 0.06
    assert guarded > unguarded + 0.1


def test_features_that_cannot_be_learned_change_nothing():
    learner, kept = fresh()
    say(learner, kept, "first", "ada", rows(1)[0])
    digest, guards = learner.head.digest(), learner.guards.dump()
    for z, code in (
        (np.full(DIM, np.nan), "features_not_finite"),
        (np.full(DIM, np.inf), "features_not_finite"),
        (np.ones(DIM + 1), "features_wrong_size"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            say(learner, kept, "second", "ada", z)
        assert caught.value.code == code
    assert learner.head.digest() == digest and learner.guards.dump() == guards


def test_the_guards_come_back_from_json_bit_for_bit():
    learner, kept = fresh()
    for n, z in enumerate(rows(50)):
        say(learner, kept, f"s{n}", f"r{n % 7}", z, float(n % 3 > 0), p_self=0.3 + 0.01 * n, at_s=1e9 + n)
        learner.guards.propensity.learn(propensity.inputs(0.4, 1.0, 0.2, n, n // 2, asked=False), rated=n % 2 == 0)
    learner.check("r1", right=False, book=kept)
    assert Guards.read(learner.guards.dump()) == learner.guards


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


def test_drift_is_found_where_there_is_one_and_only_there():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        steady, changing = Adwin(), Adwin()
        found = [steady.observe(float(loss)) for loss in rng.exponential(0.6, 3_000)]
        assert not any(found)
        for loss in rng.normal(0.5, 0.2, 600):
            assert not changing.observe(float(loss))
        assert any(changing.observe(float(loss)) for loss in rng.normal(1.1, 0.2, 200))


def test_a_change_of_taste_widens_the_posterior():
    learner, kept = fresh()
    rng = np.random.default_rng(3)
    truth = rng.normal(size=DIM) * 3.0
    for n in range(900):
        z = rng.normal(size=DIM)
        say(learner, kept, f"s{n}", f"r{n % 30}", z, float((z @ truth > 0) == (n < 600)))
    assert learner.guards.drift.num_drifts >= 1 and learner.guards.inflation > 1.0


def test_recalibration_and_self_evaluation_are_used_only_where_they_help():
    rng = random.Random(0)
    honest, overconfident, helped = Calibration(), Calibration(), Calibration()
    for _ in range(3_000):
        truth = rng.gauss(0.0, 1.0)
        target = float(rng.random() < sigmoid(truth))
        noise = sigmoid(rng.gauss(0.0, 1.0))
        honest.observe(sigmoid(truth), target, noise)
        overconfident.observe(sigmoid(3.0 * truth), target)
        helped.observe(0.5, target, sigmoid(truth))
    assert not honest.uses_recalibration and not honest.uses_self_evaluation
    assert overconfident.uses_recalibration and overconfident.used.ece < overconfident.head.ece / 2
    assert helped.uses_self_evaluation and helped.p_good(0.5, 0.9) > 0.7 > helped.p_good(0.5)


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1))
@settings(deadline=None)
def test_the_reliability_table_holds_every_forecast(forecasts):
    table = Reliability()
    for p, target in forecasts:
        table.observe(p, float(target))
    assert sum(row["count"] for row in table.table()) == len(forecasts)
    assert 0.0 <= table.ece <= 1.0


def signal(kind, **fields):
    return Standing("fb_1", 1, "ep_1", "ada", kind, "ep_1", **fields)


def test_a_kind_is_worth_what_it_agrees_with_people():
    kinds = Kinds()
    for _ in range(200):
        kinds.compare(signal("verifier", value=1), [signal("thumb", value=1)])
        kinds.compare(signal("thumb", value=1), [signal("judge", score=0.1)])
        kinds.compare(signal("implicit", name="copied"), [signal("verifier", value=1)])  # neither is explicit
    assert kinds.weight("verifier") > 0.9 and kinds.weight("judge") == 0.0 and kinds.weight("thumb") == 1.0
    assert kinds.report()["copied"]["compared"] == pytest.approx(0.0)


def test_a_kind_that_says_nothing_is_held_and_does_not_come_back_with_its_rater():
    learner, kept = fresh()
    held = say(learner, kept, "nothing", "ada", rows(1)[0], weight=0.0)
    assert [change.action for change in held] == ["hold"]
    learner.rule(["ada"], "banned", kept)
    assert learner.rule(["ada"], "cleared", kept) == []


def test_who_corrects_says_something_however_they_voted():
    kinds = Kinds()
    for _ in range(200):
        kinds.compare(signal("correction", text="Better."), [signal("thumb", value=1)])
    assert kinds.weight("correction") == 0.2


def test_reasons_that_point_both_ways_say_nothing():
    assert verdict_of(signal("reasons", reasons=("too_long", "exactly_right"))) is None
    assert verdict_of(signal("reasons", reasons=("too_long",))) == 0.0
    assert verdict_of(signal("rating", value=5)) == 1.0 and verdict_of(signal("rating", value=1)) == 0.0


def test_ratings_of_answers_that_are_seldom_rated_weigh_more_but_never_too_much():
    model, rng = propensity.Propensity(), random.Random(1)
    liked = propensity.inputs(0.95, 0.5, 0.0, 10, 5, asked=False)
    plain = propensity.inputs(0.5, 0.5, 0.0, 10, 5, asked=False)
    for _ in range(2_000):
        model.learn(liked, rated=rng.random() < 0.6)
        model.learn(plain, rated=rng.random() < 0.05)
    assert model.weight(liked, 0.02) < 1.0 < model.weight(plain, 0.02) <= propensity.MAX_WEIGHT
    assert model.loss < model.constant_loss


def test_who_is_asked_is_chance_that_repeats_itself_with_the_logged_probability():
    ours = Settings(home="/nowhere", ask_share=0.02, ask_informative_share=0.5)
    asked = [asking.decide(f"ep_{n}", informative=False, settings=ours) for n in range(20_000)]
    assert asked == [asking.decide(f"ep_{n}", informative=False, settings=ours) for n in range(20_000)]
    share = sum(reason == "random" for reason, _ in asked) / 20_000
    assert abs(share - 0.02) < 5 * math.sqrt(0.02 * 0.98 / 20_000) and {p for _, p in asked} == {0.02}
    informative = [asking.decide(f"ep_{n}", informative=True, settings=ours) for n in range(20_000)]
    share = sum(reason is not None for reason, _ in informative) / 20_000
    assert all(p == pytest.approx(0.51) for _, p in informative)
    assert abs(share - 0.51) < 5 * math.sqrt(0.25 / 20_000)


def test_the_threshold_lets_one_of_twenty_pass():
    threshold, rng = Threshold(), random.Random(2)
    passed = sum(threshold.is_high(rng.expovariate(1.0)) for _ in range(8_000))
    assert 0.03 < passed / 8_000 < 0.07


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


def test_a_slow_trickle_of_new_people_is_no_burst():
    bursts = Bursts()
    assert not any(bursts.fresh_voted(None, 1e9 + 300.0 * n, f"qu_{n}") for n in range(2_000))


def test_on_the_first_day_everybody_is_new():
    bursts = Bursts()
    assert not any(bursts.fresh_voted(None, 1e9 + n, f"qu_{n}") for n in range(2_000))


def test_it_abstains_where_it_is_unsure_in_itself_or_against_the_usual():
    assert abstains(3.0, 2.9) and abstains(1.5, 0.7) and not abstains(1.5, 1.0) and not abstains(1.0, 0.0)


@pytest.mark.parametrize(
    ("address", "block"),
    [("8.8.4.4", "8.8.4.0/24"), ("2001:4860:4860::8888", "2001:4860:4860::/48"), ("10.0.0.1", None), ("x", None)],
)
def test_only_public_addresses_have_a_block(address, block):
    assert block_of(address) == block


@given(st.floats(0.0, 1.0))
def test_log_odds_stay_finite(p):
    assert math.isfinite(logit(p))
