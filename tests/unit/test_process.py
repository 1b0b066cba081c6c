"""A process whose work failed ends, whatever else it has begun."""

import os
import subprocess
import sys
import time

import pytest
from kafka.errors import KafkaError

from infra import kafka
from infra.kafka import TopicPartition
from infra.process import GIVE_UP_S, Heartbeat
from infra.stack.supervisor import STOP_WAIT_S

BUSY = """
import threading, time
from infra.process import run_until_stopped

def run(stop):
    {what}

threading.Thread(target=time.sleep, args=[60]).start()
run_until_stopped("part", run)
"""


def test_a_part_that_fails_is_not_kept_by_its_threads():
    done = subprocess.run(
        [sys.executable, "-c", BUSY.format(what="raise KeyError('gone')")],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and "KeyError" in done.stderr
    assert "gone" not in done.stderr, "the message of an exception may quote what a person said"


def test_a_part_whose_work_does_not_end_gives_it_up_before_it_is_killed():
    busy = BUSY.format(what="print('busy', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as part:
        assert part.stdout.readline() == b"busy\n"
        began_s = time.monotonic()
        part.terminate()
        assert part.wait(timeout=STOP_WAIT_S) == 0 and time.monotonic() - began_s >= GIVE_UP_S - 0.1
        assert b"of which nothing is kept" in part.stderr.read()


def test_a_partition_that_is_gone_is_an_error_of_the_broker():
    class Client:
        def beginning_offsets(self, partitions):
            return {TopicPartition("t", 0): 7}[partitions[0]]

    with pytest.raises(KafkaError):
        kafka.beginnings(Client(), [TopicPartition("t", 3)])


def test_a_loop_that_comes_round_leaves_a_sign_of_life_and_one_that_hangs_does_not(tmp_path, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("infra.process.time.monotonic", lambda: now_s)
    path = tmp_path / "run" / "part.alive"
    stop = Heartbeat(path)
    assert not path.exists() and not stop.is_set() and path.exists()
    os.utime(path, (0, 0))
    stop.wait(0.0)
    assert path.stat().st_mtime == 0, "the file is not written at every look"
    now_s += 6.0
    stop.wait(0.0)
    assert time.time() - path.stat().st_mtime < 60
    stop.set()
    assert stop.is_set() and stop.wait(0.0)


def test_a_part_beats_in_its_home_and_a_home_that_cannot_be_written_stops_nobody(tmp_path):
    for home in (tmp_path / "home", tmp_path / "file" / "home"):
        (tmp_path / "file").touch()
        done = subprocess.run(
            [sys.executable, "-c", BUSY.format(what="stop.is_set(); import os; os._exit(0)")],
            env={**os.environ, "EVERLOOP_HOME": str(home)}, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "run" / "part.alive").exists()
