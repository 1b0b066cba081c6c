"""The log forgets by age and size, and never what a consumer still needs."""

import subprocess
import uuid

import pytest
import sqlalchemy as sa

from infra.db import LongLock
from infra.log import outbox, retention
from infra.tables import ConsumedEvent, ConsumerRow, OutboxRow
from tests.conftest import EVERLOOP, wait_until

ANCIENT = "2001-01-01T00:00:00Z"
TOPIC = "everloop.test-retention"


@pytest.fixture
def no_housekeeping(stack):
    """Keep the ledger, which prunes once a minute, from pruning in mid-test."""
    with LongLock(stack.sessions, "housekeeping") as lock:
        wait_until(lock.take)
        yield


@pytest.fixture
def ancient(stack, no_housekeeping):
    """Three old, published events of a topic with two consumers, of which one lacks the third."""
    ids = [f"ev_{uuid.uuid4().hex}" for _ in range(3)]
    with stack.sessions.begin() as session:
        for name in ("quick", "slow"):
            session.add(ConsumerRow(name=f"test-{name}", topics=[TOPIC]))
        for event_id in ids:
            session.add(
                OutboxRow(
                    event_id=event_id, topic=TOPIC, key="k", value=b"{}", created_at=ANCIENT, published_at=ANCIENT
                )
            )
        session.add_all(ConsumedEvent(consumer="test-quick", event_id=event_id) for event_id in ids)
        session.add_all(ConsumedEvent(consumer="test-slow", event_id=event_id) for event_id in ids[:2])
    yield ids
    with stack.sessions.begin() as session:
        session.execute(sa.delete(ConsumerRow).where(ConsumerRow.name.startswith("test-")))
        session.execute(sa.delete(ConsumedEvent).where(ConsumedEvent.consumer.startswith("test-")))
        session.execute(sa.delete(OutboxRow).where(OutboxRow.topic == TOPIC))


def kept(stack, ids):
    with stack.sessions() as session:
        found = set(session.scalars(sa.select(OutboxRow.event_id).where(OutboxRow.event_id.in_(ids))))
    return [event_id in found for event_id in ids]


def test_old_events_go_once_everybody_has_applied_them(stack, ancient):
    settings = stack.settings.model_copy(update={"log_retention_days": 3650.0})
    assert retention.prune(stack.sessions, settings) == 2
    assert kept(stack, ancient) == [False, False, True]
    with stack.sessions.begin() as session:
        session.add(ConsumedEvent(consumer="test-slow", event_id=ancient[2]))
    assert retention.prune(stack.sessions, settings) == 1
    assert kept(stack, ancient) == [False] * 3


def test_over_the_size_the_oldest_go_first(stack, ancient):
    with stack.sessions() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})  # others go on writing
        (size,) = session.execute(sa.select(sa.func.sum(sa.func.octet_length(OutboxRow.value)))).one()
        seqs = session.scalars(sa.select(OutboxRow.seq).order_by(OutboxRow.seq)).all()
        assert retention._size_boundary(session, size) is None
        boundary = retention._size_boundary(session, size - 1)
        assert boundary == seqs[0], "one byte over the size costs the oldest event, and no more"
        assert retention._size_boundary(session, 0) == seqs[-1]


def test_a_replay_for_one_topic_leaves_the_others_alone(stack, ancient):
    with stack.sessions() as session:
        before = session.scalar(sa.select(sa.func.count()).where(OutboxRow.published_at.is_(None)))
        assert outbox.republish(session, 0, [TOPIC]) == 3
        after = session.scalar(sa.select(sa.func.count()).where(OutboxRow.published_at.is_(None)))
        assert after - before == 3
        session.rollback()
        assert outbox.republish_unconsumed(session, [TOPIC]) == 1, "only what the slow one lacks"
        session.rollback()


def test_a_retired_consumer_holds_nothing_back_and_a_running_one_is_not_retired(stack, ancient):
    settings = stack.settings.model_copy(update={"log_retention_days": 3650.0})
    done = subprocess.run([*EVERLOOP, "log", "retire", "test-slow"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert retention.prune(stack.sessions, settings) == 3
    with stack.sessions() as session:  # it registers some seconds after the stack is up
        wait_until(lambda: session.get(ConsumerRow, "reward", populate_existing=True) is not None)
    for name, code in (("reward", "consumer_running"), ("nobody", "consumer_not_found")):
        done = subprocess.run([*EVERLOOP, "log", "retire", name], capture_output=True, text=True)
        assert done.returncode == 1 and f"[{code}]" in done.stderr
