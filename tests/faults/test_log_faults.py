"""Processes of the log come, go and die; every event is applied once and in the order of its key."""

import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager

import orjson
import sqlalchemy as sa

from infra import kafka
from infra.events import SignalSetAside
from infra.log import retention
from infra.stack.renewal import renew_broker
from tests.conftest import wait_until
from tests.faults.harness import all_records, cli, cli_fails, process

SLOW, QUICK = "0.05", "0"
LEASES = (
    "SELECT pid, count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted "
    "AND classid = (hashtext(:name)::bigint & 4294967295)::oid GROUP BY pid"
)


@contextmanager
def emitting(log, run, rate_per_s=30):
    """Write events at a steady rate for the length of the block; yield the list of their ids, which grows."""
    ids, stop = [], threading.Event()

    def emit():
        while not stop.wait(3 / rate_per_s):
            ids.extend(log.emit(run, range(len(ids), len(ids) + 3)))

    thread = threading.Thread(target=emit)
    thread.start()
    try:
        yield ids
    finally:
        stop.set()
        thread.join()


def shares(log, consumer):
    """Return how many partitions each process of a consumer holds, the largest share first."""
    return sorted((n for _, n in log.rows(LEASES, name=f"everloop.consumer.{consumer}")), reverse=True)


def working(log, consumer, run, pids):
    """Tell whether each of these processes, and no other, wrote something lately."""
    before = len(log.applied(consumer, run))
    time.sleep(0.5)
    return {pid for *_, pid in log.applied(consumer, run)[before:]} == set(pids)


def assert_each_once_in_order(applied, ids):
    counts = Counter(event_id for event_id, *_ in applied)
    assert set(counts) == set(ids) and set(counts.values()) == {1}
    numbers = {}
    for _, key, number, _ in applied:
        numbers.setdefault(key, []).append(number)
    assert all(of_key == sorted(of_key) for of_key in numbers.values())


def test_processes_of_one_consumer_share_the_partitions_and_hand_them_over(log):
    name = "tally-shared"
    with emitting(log, "shared") as ids, process("tests.faults.tally", name, SLOW) as first:
        wait_until(
            lambda: working(log, name, "shared", [first.pid]) and shares(log, name) == [3],
            what="the first process did not begin",
        )
        with process("tests.faults.tally", name, SLOW) as second:
            wait_until(
                lambda: working(log, name, "shared", [first.pid, second.pid]) and shares(log, name) == [2, 1],
                what="they do not share",
            )
            first.send_signal(signal.SIGKILL)
            wait_until(
                lambda: working(log, name, "shared", [second.pid]) and shares(log, name) == [3],
                10,
                "nobody took the dead one's part",
            )
            with process("tests.faults.tally", name, SLOW) as third:
                wait_until(lambda: working(log, name, "shared", [second.pid, third.pid]), what="no share")
                second.send_signal(signal.SIGTERM)
                assert second.wait(10) == 0
                wait_until(lambda: working(log, name, "shared", [third.pid]), 10, "no hand-over")
                there = max(len(ids), 200)  # one process alone may not keep up with what comes after
                wait_until(lambda: len(log.applied(name, "shared")) >= there, 60, what="not all applied")
    with process("tests.faults.tally", name, QUICK):
        wait_until(lambda: len(log.applied(name, "shared")) >= len(ids), what="not all applied")
    assert_each_once_in_order(log.applied(name, "shared"), ids)


def test_a_broker_that_has_grown_large_is_started_anew_and_nothing_is_lost(log):
    name = "tally-renewed"
    assert renew_broker(log.settings) is None, "it is small"

    def broker():
        return next(part.pid for part in log.supervisor.status() if part.name == "broker")

    before = broker()
    with emitting(log, "renewed") as ids, process("tests.faults.tally", name, SLOW):
        wait_until(lambda: len(log.applied(name, "renewed")) > 20)
        assert renew_broker(log.settings, max_mib=1.0) > 1.0
        wait_until(lambda: broker() not in (None, before), 10, "it did not come back")
        at_renewal = len(ids)
        wait_until(lambda: len(ids) > at_renewal + 60)
    with process("tests.faults.tally", name, QUICK):
        wait_until(lambda: len(log.applied(name, "renewed")) >= len(ids), 60, "not all applied")
    assert_each_once_in_order(log.applied(name, "renewed"), ids)


def test_sigterm_ends_between_two_transactions(log):
    name = "tally-stopped"
    ids = log.emit("stopped", range(300))
    with process("tests.faults.tally", name, SLOW) as child:
        wait_until(lambda: len(log.applied(name, "stopped")) > 20)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    applied = log.applied(name, "stopped")
    assert 20 < len(applied) < len(ids)
    positions = log.rows(
        "SELECT topic, partition, next_offset FROM consumer_positions WHERE consumer = :name", name=name
    )
    behind = before_positions(log, {kafka.TopicPartition(topic, p): offset for topic, p, offset in positions})
    claimed = {row.event_id for row in log.rows("SELECT event_id FROM consumed_events WHERE consumer = :c", c=name)}
    # What lies before the positions, what is noted as applied, and what was done are the same.
    assert {event_id for event_id in behind if event_id.startswith("stopped-")} == {row.event_id for row in applied}
    assert behind == claimed
    with process("tests.faults.tally", name, QUICK):
        wait_until(lambda: len(log.applied(name, "stopped")) >= len(ids))
    assert_each_once_in_order(log.applied(name, "stopped"), ids)


def test_a_second_relay_stands_by_and_takes_over_from_a_killed_one(log):
    log.supervisor.stop("relay")
    try:
        with emitting(log, "relays") as ids, process("infra.log.relay") as first:
            wait_until(lambda: num_published(log, "relays") > 30)
            holder = relay_backend(log)
            with process("infra.log.relay"):
                time.sleep(3)
                assert relay_backend(log) == holder, "two relays at once would break the order"
                first.send_signal(signal.SIGKILL)
                first.wait()
                at_kill = len(ids)
                wait_until(lambda: num_published(log, "relays") > at_kill + 30, 60, "nobody took over")
                assert relay_backend(log) != holder
                wait_until(lambda: len(ids) > 200)
    finally:
        log.supervisor.start("relay")
    wait_until(lambda: num_published(log, "relays") == len(ids))
    seen = {}
    for record in all_records(log, SignalSetAside.topic):
        content = orjson.loads(record.value)
        if content["id"].startswith("relays-"):
            # A repetition (published, but not yet marked at the kill) is skipped by consumers.
            seen.setdefault(content["id"], (content["data"]["episode_id"], int(content["data"]["feedback_id"])))
    assert_each_once_in_order([(event_id, *place, 0) for event_id, place in seen.items()], ids)


def test_what_a_forgetful_broker_took_along_is_sent_again(log):
    """Published, but not yet applied, when the broker dies with its memory."""
    name = "tally-forgotten"
    with process("tests.faults.tally", name, QUICK):  # what other tests have said comes first
        markers = log.emit("remembered", range(60))
        wait_until(lambda: len(log.applied(name, "remembered")) == len(markers))
    with process("tests.faults.tally", name, SLOW) as child:
        ids = log.emit("forgotten", range(60))
        wait_until(lambda: len(log.applied(name, "forgotten")) > 5)
        child.send_signal(signal.SIGKILL)
    wait_until(lambda: num_published(log, "forgotten") == 60)
    os.kill(next(part.pid for part in log.supervisor.status() if part.name == "broker"), signal.SIGKILL)
    assert len(log.applied(name, "forgotten")) < 60
    with process("tests.faults.tally", name, QUICK):
        wait_until(lambda: len(log.applied(name, "forgotten")) >= 60, 120, "what the broker forgot is lost")
    assert_each_once_in_order(log.applied(name, "forgotten"), ids)


def test_a_dead_letter_is_listed_shown_retried_and_dropped(log):
    name = "tally-refusing"
    with log.sessions.begin() as session:
        session.execute(sa.text("INSERT INTO tally_refuses VALUES ('refused-event-0'), ('refused-event-1')"))
    with process("tests.faults.tally", name, QUICK):
        log.emit("refused", range(12), num_keys=1)
        wait_until(lambda: len(log.applied(name, "refused")) == 10, 30, "those behind a dead letter do not go on")
        letters = {
            letter["event_id"]: letter
            for letter in cli("log", "dead", "list")["dead_letters"]
            if letter["consumer"] == name
        }
        assert set(letters) == {"refused-event-0", "refused-event-1"}
        first, second = letters["refused-event-0"], letters["refused-event-1"]
        assert first["reason"] == "RuntimeError" and first["tries"] == 3
        shown = cli("log", "dead", "show", str(first["id"]))
        assert "in write" in shown["stack"] and "SECRET" not in shown["stack"] + shown["reason"]
        with log.sessions.begin() as session:
            session.execute(sa.text("DELETE FROM tally_refuses"))  # the fix
        cli("log", "dead", "retry", str(first["id"]), report=False)
        wait_until(lambda: len(log.applied(name, "refused")) == 11, what="the retried one was not applied")
        cli("log", "dead", "drop", str(second["id"]), report=False)
    states = {letter["id"]: letter["state"] for letter in cli("log", "dead", "list", "--all")["dead_letters"]}
    assert (states[first["id"]], states[second["id"]]) == ("retried", "dropped")
    assert not {first["id"], second["id"]} & {row["id"] for row in cli("log", "dead", "list")["dead_letters"]}
    for verb in ("retry", "drop"):
        refused = cli_fails("log", "dead", verb, str(first["id"]))
        assert "dead_letter_closed" in refused
    assert "dead_letter_not_found" in cli_fails("log", "dead", "show", "999999")
    assert Counter(event_id for event_id, *_ in log.applied(name, "refused")).most_common(1)[0][1] == 1


def test_a_replay_applies_nothing_twice(log):
    name = "tally-replayed"
    with process("tests.faults.tally", name, QUICK):
        ids = log.emit("replayed", range(60))
        wait_until(lambda: len(log.applied(name, "replayed")) == 60)
        num_records = len(all_records(log, SignalSetAside.topic))
        replayed = cli("log", "replay", "--from", "0", "--topic", SignalSetAside.topic)
        assert replayed["events"] >= 60
        wanted = num_records + replayed["events"]
        # The broker has lost its memory in a test before this one: a producer may take 21 s to begin anew, twice.
        wait_until(lambda: len(all_records(log, SignalSetAside.topic)) >= wanted, timeout_s=90)
        later = log.emit("replayed", range(60, 72))  # behind the repetitions
        wait_until(lambda: len(log.applied(name, "replayed")) == 72)
    assert_each_once_in_order(log.applied(name, "replayed"), ids + later)
    assert "unknown_topic" in cli_fails("log", "replay", "--from", "0", "--topic", "nothing")


def test_retention_keeps_what_one_consumer_still_lacks(log):
    """Last in this module: it prunes the log."""
    name = "tally-behind"
    with process("tests.faults.tally", name, QUICK):
        log.emit("early", range(30))
        wait_until(lambda: len(log.applied(name, "early")) == 30)
    log.emit("late", range(30))
    wait_until(lambda: num_published(log, "late") == 30)
    retention.prune(log.sessions, log.settings.model_copy(update={"log_retention_days": 1e-9}))
    assert num_published(log, "late") == 30
    with process("tests.faults.tally", name, QUICK):
        wait_until(lambda: len(log.applied(name, "late")) == 30)


def num_published(log, run):
    query = "SELECT count(*) FROM outbox WHERE event_id LIKE :run AND published_at IS NOT NULL"
    return log.rows(query, run=f"{run}-event-%")[0][0]


def relay_backend(log):
    """Return the database's process that holds the relay's lock."""
    key = "hashtextextended('everloop.relay', 0)"
    rows = log.rows(
        f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
        f"AND classid = (({key} >> 32) & 4294967295)::oid AND objid = ({key} & 4294967295)::oid"
    )
    assert len(rows) <= 1
    return rows[0].pid if rows else None


def before_positions(log, positions):
    """Return the ids of the events that lie before the given positions."""
    (topic,) = {partition.topic for partition in positions}
    return {
        orjson.loads(record.value)["id"]
        for record in all_records(log, topic)
        if record.offset < positions[kafka.TopicPartition(topic, record.partition)]
    }
