"""The whole demo, as its user runs it, with the reward worker killed on the way."""

import json
import os
import signal
import subprocess
import time

import pytest

from infra import settings as settings_module
from infra.stack.supervisor import Supervisor, stack_processes
from tests.conftest import EVERLOOP

NUM_KILLS = 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_loop_closes_and_loses_nothing_while_its_worker_is_killed(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("EVERLOOP_HOME", str(home))
    report = tmp_path / "demo.json"
    demo = subprocess.Popen([*EVERLOOP, "demo", "--exit", "--json", str(report)])
    killed = set()
    while demo.poll() is None:
        time.sleep(20)
        supervisor = Supervisor(settings_module.load())
        if len(killed) < NUM_KILLS and supervisor.running():
            worker = next(part for part in supervisor.status() if part.name == "reward")
            if worker.pid is not None and worker.uptime_s > 15:
                os.kill(worker.pid, signal.SIGKILL)
                killed.add(worker.pid)
    assert demo.returncode == 0 and len(killed) == NUM_KILLS
    result = json.loads(report.read_text())
    assert result["lost_events"] == 0 and result["closed"]
    assert any(part["fate"] == "promoted" for part in result["receipt"]["training"])
    night = result["nights"][0]
    assert night["decision"] == "promote" and night["seconds"] <= 360
    # +25 points are asked for; three standard errors of a difference of rates with n=90 each are about 16.
    assert night["difference"] >= 0.25 - 0.16 and night["difference_ci95"][0] > 0
    assert not stack_processes(home)
