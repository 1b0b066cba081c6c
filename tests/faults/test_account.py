"""The account after a storm finds what is wrong, if something is."""

import itertools
import json

import pytest
import sqlalchemy as sa

from flows.bench.faults import _until_drained
from flows.bench.load import Client
from flows.bench.proof import account
from flows.bench.raters import signals, write_pairs
from reward.encoder import open_encoder

NUM_SIGNALS = 240


@pytest.fixture(scope="module")
def promised(log):
    """Signals that were accepted and applied: their ids by idempotency key."""
    source = signals(write_pairs(log.sessions), 0, "s")
    client = Client(log.settings)
    accepted = {}
    for _ in range(2):  # the second half changes what was learned from the first
        for signal in itertools.islice(source, NUM_SIGNALS // 2):
            accepted[signal["idempotency_key"]] = client.post("/v1/feedback", json.dumps(signal).encode())["id"]
        _until_drained(log.sessions)
    return accepted


def found(log, accepted, *changes):
    """Return the account after some changes, which are rolled back."""
    encoder = open_encoder(log.settings)
    with log.sessions() as session:
        for change in changes:
            assert session.execute(sa.text(change)).rowcount, change
        return account(session, accepted, encoder.name, encoder.dim)


def test_without_a_fault_there_is_nothing_to_find(log, promised):
    clean = found(log, promised)
    assert clean.lost == clean.counted_twice == {} and clean.dead_letters == 0
    assert clean.same_bits and clean.same_signals
    assert 0 < clean.num_standing < clean.num_updates


LAST_ADD = "(SELECT max(seq) FROM reward_updates WHERE action = 'add')"
OF_LAST = f"(SELECT feedback_id FROM reward_updates WHERE seq = {LAST_ADD})"


def test_a_lost_signal_is_found(log, promised):
    assert set(found(log, {**promised, "another": "fb_gone"}).lost) == {"another"}
    key = next(iter(promised))
    assert set(found(log, {**promised, key: "fb_changed"}).lost) == {key}
    for consumer in ("reward", "receipts"):
        row = f"consumer = '{consumer}' AND event_id = '{promised[key]}'"
        assert set(found(log, promised, f"DELETE FROM consumed_events WHERE {row}").lost) == {key}
        given_up = f"UPDATE consumed_events SET dead_letter = true WHERE {row}"
        assert set(found(log, promised, given_up).lost) == {key}
    unsaid = f"UPDATE receipts SET status = 'accepted' WHERE feedback_id = '{promised[key]}'"
    assert set(found(log, promised, unsaid).lost) == {key}


def test_a_signal_that_counts_twice_is_found(log, promised):
    key = next(iter(promised))
    others = {name: feedback_id for name, feedback_id in promised.items() if name != key}
    assert set(found(log, others).counted_twice) == {promised[key]}
    moved = f"UPDATE receipts SET update_seq = update_seq + 1 WHERE feedback_id = {OF_LAST}"
    assert len(found(log, promised, moved).counted_twice) == 1
    again = (
        "INSERT INTO outbox (event_id, topic, key, value) SELECT 'again', topic, key, value FROM outbox "
        "WHERE topic = 'everloop.rewards' ORDER BY seq DESC LIMIT 1"
    )
    assert len(found(log, promised, again).counted_twice) == 1


def test_a_wrong_reward_state_is_found(log, promised):
    history = "DELETE FROM reward_snapshots"  # so that recovery starts from nothing
    altered = f"UPDATE reward_updates SET precision = precision * 1.0000001 WHERE seq = {LAST_ADD}"
    wrong = found(log, promised, history, altered)
    assert not wrong.same_bits and wrong.same_signals
    assert not found(log, promised, f"DELETE FROM reward_updates WHERE seq = {LAST_ADD}").same_signals
