"""A storm of SIGKILLs under load: nothing is lost, nothing counts twice, and the reward model knows it all."""

import json
import os
import subprocess

import pytest

from flows.bench.faults import TARGETS, plan
from tests.conftest import EVERLOOP
from tests.faults.harness import ROOT


def storm(tmp_path, kills, seed):
    """Run ``everloop bench faults`` and return its report."""
    report = tmp_path / "storm.json"
    done = subprocess.run(
        [*EVERLOOP, "bench", "faults",
         "--kills", str(kills), "--seed", str(seed), "--json", str(report)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def check(result, kills):
    assert result["kills"] == sum(result["kills_per_part"].values()) == kills
    assert set(result["kills_per_part"]) == set(TARGETS) and min(result["kills_per_part"].values()) >= 1
    for part in TARGETS:
        assert 0 < result[f"recovery_{part}_median_s"] <= result[f"recovery_{part}_max_s"]
    for name in ("lost", "counted_twice", "dead_letters", "changed_ids"):
        assert result[name] == 0, name
    assert result["reward_state_equal"] and result["reward_same_bits"] and result["reward_same_signals"]
    assert result["signals_accepted"] > kills and 0 < result["signals_standing"] < result["updates"]


def test_the_plan_follows_from_its_seed_and_spares_no_part():
    plans = plan(50, seed=1)
    assert plans == plan(50, seed=1) != plan(50, seed=2)
    assert {following.part for following in plans} == set(TARGETS)
    assert sum(following.overlapping for following in plans) == 10


@pytest.mark.slow
def test_six_kills_lose_nothing(home, tmp_path):
    check(storm(tmp_path, 6, seed=1), 6)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills_lose_nothing(home, tmp_path):
    result = storm(tmp_path, 50, seed=1)
    check(result, 50)
    assert result["kills_overlapping"] >= 5
