"""The learner and its guards, without a model or a database."""

import math
import random

import numpy as np
import pytest

from flows.bench import attacks
from flows.bench.attacks import Kept
from infra.errors import InvalidRequestError
from infra.settings import Settings
from reward import asking, propensity
from reward.drift import MAX_LOSS, Adwin
from reward.learner import Guards, Learner, Observation, Threshold, abstains
from reward.online import PRIOR_VARIANCE, BayesianHead, Score

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


def test_drift_is_found_where_there_is_one_and_only_there():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        steady, changing = Adwin(), Adwin()
        found = [steady.observe(float(loss)) for loss in rng.exponential(0.6, 3_000)]
        assert not any(found)
        for loss in rng.normal(0.5, 0.2, 600):
            assert not changing.observe(float(loss))
        assert any(changing.observe(float(loss)) for loss in rng.normal(1.1, 0.2, 200))


def test_better_forecasts_are_no_drift_and_one_surprise_is_none():
    rng, adwin = np.random.default_rng(0), Adwin()
    for loss in (*rng.normal(1.1, 0.2, 600), *rng.normal(0.5, 0.2, 600)):
        assert not adwin.observe(float(loss))
    assert adwin.num_drifts == 0
    adwin.observe(1e9)
    assert adwin.buckets[-1].total == MAX_LOSS


def test_a_change_of_taste_widens_the_posterior():
    learner, kept = fresh()
    rng = np.random.default_rng(3)
    truth = rng.normal(size=DIM) * 3.0
    for n in range(900):
        z = rng.normal(size=DIM)
        say(learner, kept, f"s{n}", f"r{n % 30}", z, float((z @ truth > 0) == (n < 600)))
    assert learner.guards.drift.num_drifts >= 1 and learner.guards.inflation > 1.0


def test_a_kind_that_says_nothing_is_held_and_does_not_come_back_with_its_rater():
    learner, kept = fresh()
    held = say(learner, kept, "nothing", "ada", rows(1)[0], weight=0.0)
    assert [change.action for change in held] == ["hold"]
    learner.rule(["ada"], "banned", kept)
    assert learner.rule(["ada"], "cleared", kept) == []


class Always:
    """Finds a drift each time."""

    num_drifts = 0

    def observe(self, loss):
        return True


def test_however_often_people_change_the_posterior_is_never_wider_than_the_prior():
    learner, kept = fresh()
    learner.guards.drift = Always()
    for n, z in enumerate(rows(30)):
        say(learner, kept, f"s{n}", "ada", z)
        assert learner.head.mean_variance <= PRIOR_VARIANCE * (1.0 + 1e-12)
    assert learner.guards.inflation > 1.0


def test_the_usual_uncertainty_follows_slowly():
    learner, _ = fresh()
    for sd in [1.0] + [2.0] * 100:
        learner.note_usual(sd)
    assert learner.guards.usual_sd == pytest.approx(2.0 - 0.99**100)


def test_ratings_of_answers_that_are_seldom_rated_weigh_more_but_never_too_much():
    model, rng = propensity.Propensity(), random.Random(1)
    liked = propensity.inputs(0.95, 0.5, 0.0, 10, 5, asked=False)
    plain = propensity.inputs(0.5, 0.5, 0.0, 10, 5, asked=False)
    for _ in range(2_000):
        model.learn(liked, rated=rng.random() < 0.6)
        model.learn(plain, rated=rng.random() < 0.02)
    assert model.weight(liked, 0.02) < 1.0
    assert model.weight(plain, 0.02) == propensity.MAX_WEIGHT
    assert model.loss < model.constant_loss


def test_while_little_is_known_of_who_rates_every_rating_weighs_the_same():
    model, x = propensity.Propensity(), propensity.inputs(0.95, 0.5, 0.0, 10, 5, asked=False)
    for n in range(propensity.MIN_SEEN):
        assert model.weight(x, 0.02) == 1.0
        model.learn(x, rated=n < 60)
    assert model.weight(propensity.inputs(0.05, 0.5, 0.0, 10, 1, asked=False), 0.02) != 1.0


def test_whether_a_rating_was_asked_for_is_averaged_over():
    model, rng = propensity.Propensity(), random.Random(1)
    asked, unasked = (propensity.inputs(0.5, 0.5, 0.0, 10, 5, asked=asked) for asked in (True, False))
    for _ in range(1_000):
        model.learn(asked, rated=rng.random() < 0.9)
        model.learn(unasked, rated=rng.random() < 0.1)
    assert model.weight(asked, 0.3) == model.weight(unasked, 0.3)
    assert model.weight(asked, 1.0) < model.weight(asked, 0.3) < model.weight(asked, 0.0)


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


def test_what_anchors_is_a_rating_and_of_the_rest_a_share_is_a_choice_between_two():
    ours = Settings(home="/nowhere", ask_pair_share=0.25)
    forms = [asking.form_of(f"ep_{n}", "informative", ours) for n in range(20_000)]
    assert abs(forms.count("pair") / len(forms) - 0.25) < 0.015
    assert {asking.form_of(f"ep_{n}", "random", ours) for n in range(1000)} == {"rating"}


def test_a_vote_teaches_most_where_the_outcome_is_open_and_little_is_known():
    score = {
        name: asking.expected_gain(Score(0.0, sd, p))
        for name, sd, p in (("open", 1.0, 0.5), ("decided", 1.0, 0.95), ("known", 0.2, 0.5), ("sure", 0.0, 0.5))
    }
    assert score["open"] > score["decided"] > 0.0 and score["open"] > score["known"] > 0.0 == score["sure"]
    assert score["open"] == pytest.approx(0.5 * math.log(1.25))


def test_the_threshold_lets_one_of_twenty_pass_once_it_knows_what_is_usual():
    threshold, rng = Threshold(), random.Random(2)
    assert not any(threshold.is_high(rng.expovariate(1.0)) for _ in range(20))
    passed = sum(threshold.is_high(rng.expovariate(1.0)) for _ in range(8_000))
    assert 0.03 < passed / 8_000 < 0.07


def test_it_abstains_where_it_is_unsure_in_itself_or_against_the_usual():
    assert abstains(3.0, 2.9) and abstains(1.5, 0.7) and not abstains(1.5, 1.0) and not abstains(1.0, 0.0)
