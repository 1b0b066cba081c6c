"""A process whose work failed ends, whatever else it has begun."""

import subprocess
import sys
import time

import pytest
from kafka.errors import KafkaError

from infra import kafka
from infra.kafka import TopicPartition
from infra.process import GIVE_UP_S
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
