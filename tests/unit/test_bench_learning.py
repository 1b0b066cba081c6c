"""The learning bench: what it makes of the lives that it plays, and that it plays none twice."""

import json

import pytest

from flows.bench import learning
from infra.errors import InvalidRequestError

RATES = {"short": (0.0, [0.6, 0.7, 0.9], 0.4), "reader": (0.6, [0.8, 0.6, 1.0], 0.7)}


@pytest.fixture
def played(monkeypatch):
    """Lives with the rates of RATES; the plans that were played."""
    plans = []

    def play(plan):
        plans.append(plan)
        base, nights, quarter = RATES[plan.preference]
        rates = nights[: plan.nights] if plan.rated == 400 else [quarter]
        skills = {"skills": {"delta": -1.0}} if plan.tasks_per_skill else {}
        return {"base": {"rate": base}, "nights": [{"rate": rate} for rate in rates], **skills}

    monkeypatch.setattr(learning.life, "play", play)
    monkeypatch.setattr(learning.training, "measure", lambda *_: {"overhead_ratio": 1.01, "memory_ratio": 1.02})
    return plans


def measured(lives_dir=None):
    return learning.learning(["short", "reader"], 3, 400, 90, {}, 0, lives_dir)


def test_gains_are_points_and_above_one_half_the_share_of_the_way_to_one(played):
    found = measured()
    assert found["mean_gain_1"] == pytest.approx((60 + 50) / 2)
    assert found["mean_gain_3"] == pytest.approx((90 + 100) / 2)
    assert found["quarter_share"] == pytest.approx(((40 + 25) / 2) / 55)
    assert (found["verifier_delta"], found["overhead_ratio"], found["memory_ratio"]) == (-1.0, 1.01, 1.02)
    assert [(plan.preference, plan.rated, plan.nights) for plan in played] == [
        ("short", 400, 3),
        ("short", 100, 1),
        ("reader", 400, 3),
        ("reader", 100, 1),
    ]


def test_without_the_quarter_there_is_no_share_of_it(played):
    found = learning.learning(["short"], 1, 400, 90, {}, 0, None, quarter=False)
    assert len(played) == 1 and found["quarter_share"] is None and found["mean_gain_1"] == 60


def test_a_bench_that_was_stopped_plays_only_what_is_missing(played, tmp_path):
    first = measured(tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == len(played) == 4
    next(path for path in kept if json.loads(path.read_text())["plan"]["preference"] == "reader").unlink()
    assert measured(tmp_path) == first and len(played) == 5
    learning.learning(["short"], 2, 400, 90, {}, 0, tmp_path)  # another plan is another life
    assert len(played) == 6


def test_a_night_that_failed_gained_nothing_and_an_unknown_preference_is_refused_before_anything_is_played(played):
    assert learning.gain(0.2, None) == 0.0
    with pytest.raises(InvalidRequestError, match="short"):
        learning.learning(["shrt"], 3, 400, 90, {}, 0, None)
    assert not played
