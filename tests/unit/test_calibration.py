"""Whether forecasts are right, and what is learned of how they are not; what kinds of signals are worth."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.fold import Standing
from reward.calibration import Calibration, Reliability, logit
from reward.kinds import Kinds, verdict_of
from reward.online import sigmoid


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
    assert honest.p_good(0.7, 0.2) == honest.p_good(0.7) == 0.7, "what is not used changes nothing"
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


def test_the_self_evaluation_must_beat_what_recalibration_does_already():
    calibration, rng = Calibration(), random.Random(0)
    for _ in range(2_000):
        truth = rng.gauss(0.0, 1.0)
        calibration.observe(
            sigmoid(3.0 * truth), float(rng.random() < sigmoid(truth)), sigmoid(rng.gauss(0.0, 1.0))
        )
    assert calibration.uses_recalibration and not calibration.uses_self_evaluation


def test_a_pair_is_counted_from_both_sides_and_a_coin_is_half_right():
    calibration = Calibration()
    calibration.observe(0.75, 1.0, pair=True)
    rows = [(row["from"], row["count"], row["outcome"]) for row in calibration.head.table()]
    assert rows == [(0.2, 0.5, 0.0), (0.7, 0.5, 1.0)]
    calibration.observe(0.5, 1.0)
    assert calibration.num_right == 1.5


@given(st.floats(0.0, 1.0))
def test_log_odds_stay_finite(p):
    assert math.isfinite(logit(p))


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


def test_who_corrects_says_something_however_they_voted():
    kinds = Kinds()
    for _ in range(200):
        kinds.compare(signal("correction", text="Better."), [signal("thumb", value=1)])
    assert kinds.weight("correction") == 0.2


def test_what_signals_say():
    assert verdict_of(signal("reasons", reasons=("too_long", "exactly_right"))) is None
    assert verdict_of(signal("reasons", reasons=("too_long",))) == 0.0
    assert verdict_of(signal("implicit", name="copied")) == 1.0
    assert verdict_of(signal("implicit", name="abandoned")) == 0.0
    assert verdict_of(signal("rating", value=3)) == 0.5
    assert verdict_of(signal("rating", value=5)) == 1.0 and verdict_of(signal("rating", value=1)) == 0.0
