"""A running log in the hands of a test: writing to it, looking at it, processes beside it, the command line."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from infra import kafka
from infra.db import Sessions
from infra.events import SignalSetAside
from infra.log import outbox
from infra.log.outbox import Entry
from infra.settings import Settings
from infra.stack.supervisor import Supervisor
from tests.conftest import EVERLOOP

ROOT = Path(__file__).parents[2]


@dataclass
class Log:
    """A running log, and ways to write to it and to look at it."""

    settings: Settings
    sessions: Sessions
    supervisor: Supervisor

    def rows(self, query, **values):
        """Return the rows of a query."""
        with self.sessions() as session:
            return session.execute(sa.text(query), values).all()

    def emit(self, run, numbers, num_keys=12):
        """Write events of some keys, each with its number; return their ids."""
        entries = [
            Entry(
                SignalSetAside(feedback_id=str(n), episode_id=f"{run}-{n % num_keys}", reason="SECRET"),
                f"{run}-{n % num_keys}",
                f"{run}-event-{n}",
            )
            for n in numbers
        ]
        with self.sessions.begin() as session:
            outbox.append_many(session, entries)
        return [entry.event_id for entry in entries]

    def applied(self, consumer, run):
        """Return (event id, key, number, pid) of what a tally wrote down, in its order."""
        return self.rows(
            "SELECT event_id, key, number, pid FROM tally WHERE consumer = :consumer AND event_id LIKE :run "
            "ORDER BY place",
            consumer=consumer,
            run=f"{run}-event-%",
        )


@contextmanager
def process(*command):
    """Run a module of this repository as a process; whatever is left of it is killed."""
    child = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()


def all_records(log, topic):
    """Return what the broker holds of a topic, by partition and offset."""
    client = kafka.consumer(log.settings.need("kafka_bootstrap"))
    try:
        partitions = kafka.partitions(client, [topic])
        client.assign(partitions)
        ends = client.end_offsets(partitions)
        client.seek_to_beginning()
        records = []
        while any(client.position(p) < ends[p] for p in partitions):
            records += [record for polled in client.poll(200).values() for record in polled]
        return records
    finally:
        client.close()


def cli(*command, report=True):
    """Run ``everloop`` and return its report."""
    done = subprocess.run(
        [*EVERLOOP, *command, *(["--json", "-"] if report else [])],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return json.loads(done.stdout) if report else None


def cli_fails(*command):
    """Run ``everloop``, which must refuse, and return what it said."""
    done = subprocess.run([*EVERLOOP, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr
