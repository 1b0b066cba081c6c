"""Three minutes of all at once: nothing fails, nothing grows, and the log is empty soon after."""

import json
import subprocess

import pytest

from tests.conftest import EVERLOOP


@pytest.mark.timeout(900)
def test_three_minutes_of_mixed_load_leave_nothing_behind(tmp_path):
    report = tmp_path / "soak.json"
    command = [*EVERLOOP, "bench", "soak", "--minutes", "3", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert report.exists(), done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["errors"] == 0, found["what_failed"]
    assert found["leaks"] == 0, found["leaking"]
    assert found["lag_s"] <= 10 and found["minutes"] >= 3 and done.returncode == 0
    assert set(found["acts"]) == {"a night", "a canary", "the canary's end", "a promotion", "a rollback"}
    assert min(found["done"][kind] for kind in ("answer", "vote", "page")) > 20
    assert {"api", "engine", "reward", "postgres", "relay"} <= set(found["parts"])
