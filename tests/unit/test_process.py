"""A process whose work failed ends, whatever else it has begun."""

import subprocess
import sys

import pytest
from kafka.errors import KafkaError

from infra import kafka
from infra.kafka import TopicPartition

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


def test_a_partition_that_is_gone_is_an_error_of_the_broker():
    class Client:
        def beginning_offsets(self, partitions):
            return {TopicPartition("t", 0): 7}[partitions[0]]

    with pytest.raises(KafkaError):
        kafka.beginnings(Client(), [TopicPartition("t", 3)])
