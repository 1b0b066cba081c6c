"""A consumer that writes down what it applies, in a table without constraints: a double would be seen."""

import os
import sys
import time

import sqlalchemy as sa

from infra.db import connect
from infra.events import SignalSetAside
from infra.log.consumer import Consumer
from infra.process import run_until_stopped
from infra.settings import load

TABLES = (
    "CREATE TABLE tally (place bigserial, consumer text, event_id text, key text, number int, pid int)",
    "CREATE TABLE tally_refuses (event_id text)",
)
WRITE = sa.text(
    "INSERT INTO tally (consumer, event_id, key, number, pid) VALUES (:consumer, :event_id, :key, :number, :pid)"
)
REFUSED = sa.text("SELECT event_id FROM tally_refuses")


def main(name, pause_s):
    def write(session, deliveries):
        refused = set(session.scalars(REFUSED))
        for delivery in deliveries:
            if delivery.event_id in refused:
                raise RuntimeError(f"refused: {delivery.event.reason}")
            session.execute(
                WRITE,
                {
                    "consumer": name,
                    "event_id": delivery.event_id,
                    "key": delivery.event.episode_id,
                    "number": int(delivery.event.feedback_id),
                    "pid": os.getpid(),
                },
            )
        time.sleep(pause_s)  # so that kills and stops come in the middle of a transaction

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    consumer = Consumer(name, sessions, settings, {SignalSetAside: write}, batch_events=5 if pause_s else 500)
    run_until_stopped("tally", consumer.run)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
