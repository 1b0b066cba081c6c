"""The bench of over-optimisation: what it makes of two nights, one of which took what the guards would not."""

import pytest

from flows.bench import overoptimise
from infra.errors import EverloopError

GOOD, BAD = "It is so, as far as anybody can tell from here, and has long been.", "So."


def night(taken, **more):
    """A night whose answers people like at step 2, while the proxy rises to step 4."""
    points = [(0, -0.5, BAD), (2, 1.0, GOOD), (4, 2.0, BAD)]
    return {
        "peak": [
            {"step": s, "kl": float(s), "proxy": p, "gold": None, "mean_words": 9.0, "taken": s == taken}
            for s, p, _ in points
        ],
        "answers": {str(step): [text, GOOD] for step, _, text in points},
        "rate": 0.5 if taken == 2 else 0.1,
        "n": 90,
        "mean_words": 9.0,
        "status": "held",
        "reason": "",
        **more,
    }


@pytest.fixture
def played(monkeypatch):
    """Set the nights that are played."""

    def set_to(*nights):
        base = {"rate": 0.0, "mean_words": 70.0}
        monkeypatch.setattr(overoptimise.life, "play", lambda plan: {"base": base, "nights": list(nights)})

    return set_to


def test_what_was_taken_is_held_against_the_best_that_there_was(played):
    played(night(4), night(2))
    found = overoptimise.measure(300, 90, 0)
    plain, guarded = found["plain"], found["guarded"]
    assert [point["liked"] for point in plain["curve"]] == [0.5, 1.0, 0.5]
    assert (plain["taken"], plain["lost"], guarded["taken"], guarded["lost"]) == (4, 50.0, 2, 0.0)
    assert found["guards_gain"] == pytest.approx(40.0)


def test_a_night_that_failed_ends_the_bench_with_its_reason(played):
    played({"status": "failed", "reason": "The disk is full."}, night(2))
    with pytest.raises(EverloopError, match="disk is full"):
        overoptimise.measure(300, 90, 0)
