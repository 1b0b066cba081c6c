"""Anybody may write to Kafka: what is no event of ours is given up with a reason, and those behind it go on."""

import json
import uuid

import orjson
import pytest
from kafka import KafkaProducer

from flows.bench.load import Client
from flows.bench.stack import seed, user_of
from infra.events import FeedbackGiven, dead_letter_topic
from infra.log import dead_letters
from tests.conftest import wait_until
from tests.faults.harness import all_records, cli, cli_fails

SECRET = "what-somebody-said"
SCHEMA = "urn:everloop:schema:"
ALL = {"reward", "receipts", "memory"}


def event(schema="feedback.given.v1", **changes):
    """Return an envelope with the secret in its data."""
    content = {
        "specversion": "1.0",
        "id": f"ev_{uuid.uuid4().hex}",
        "type": f"dev.everloop.{schema.rpartition('.')[0]}",
        "dataschema": f"{SCHEMA}{schema}",
        "data": {"text": SECRET, "kind": SECRET, "seq": SECRET},
    }
    return json.dumps({**content, **changes}).encode()


def nested(levels):
    """Return an envelope whose data is nested deeply."""
    head = event(data=0)
    return head.replace(b'"data": 0', b'"data": ' + b"[" * levels + f'"{SECRET}"'.encode() + b"]" * levels)


# value, consumers that give it up, part of the reason
POISON = {
    "not JSON": (f"{{{SECRET}".encode(), ALL, "not JSON"),
    "not UTF-8": (b"\xff\xfe" + SECRET.encode(), ALL, "not JSON"),
    "no object": (f'["{SECRET}"]'.encode(), ALL, "no usable id"),
    "no id": (event(id=None), ALL, "no usable id"),
    "empty id": (event(id=""), ALL, "no usable id"),
    "endless id": (event(id=SECRET * 1000), ALL, "no usable id"),
    "NUL in its id": (event(id=f"ev_\x00{SECRET}"), ALL, "no usable id"),
    "NUL in its data": (
        event("signal.set_aside.v1", data=dict.fromkeys(("feedback_id", "episode_id", "reason"), f"\x00{SECRET}")),
        {"receipts"},
        "DataError",
    ),
    "said in its schema": (event(dataschema=f"{SCHEMA}{SECRET} and more"), ALL, "unknown schema"),
    "not of its schema": (event(), ALL, "not of its schema"),
    "data is no object": (event(data=SECRET), ALL, "not of its schema"),
    "schema of another event": (event("reward.updated.v1"), {"receipts"}, "not of its schema"),
    "unknown type": (event("feedback.invented.v1"), ALL, "unknown schema"),
    "unknown major version": (event("feedback.given.v9"), ALL, "unknown schema"),
    "10,000 levels": (nested(10_000), ALL, "not JSON"),
    "900 levels": (nested(900), ALL, "not of its schema"),
    "5 MB": (b"x" * 5_000_000, ALL, "not JSON"),
    "9 MB": (event("feedback.given.v9", pad="x" * 9_000_000), ALL, "unknown schema"),
    "null": (None, ALL, "not JSON"),
    "empty": (b"", ALL, "not JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def episode_ids(log):
    return seed(log.sessions, 8)


@pytest.fixture(scope="module")
def send(log):
    """Send as a stranger would, without our own bound on the size of an event."""
    bootstrap = log.settings.need("kafka_bootstrap")
    producer = KafkaProducer(bootstrap_servers=bootstrap, max_request_size=16 * 1024**2)
    yield lambda key, value: producer.send(FeedbackGiven.topic, key=key, value=value).get(30)
    producer.close()


@pytest.mark.parametrize("name", POISON)
def test_poison_is_given_up_with_a_reason_and_what_is_behind_it_is_applied(log, episode_ids, send, name):
    value, consumers, reason = POISON[name]
    place = send(episode_ids[0].encode(), value)
    good = give(log, episode_ids[0], 0)
    wait_until(lambda: applied_by(log, good) >= ALL, what="the good event behind it was not applied")
    letters = letters_at(log, place)
    assert {letter.consumer for letter in letters} == consumers
    for letter in letters:
        assert reason in letter.reason and SECRET not in letter.reason + letter.stack
        assert bytes(letter.value) == (value or b"")
    copies = wait_until(lambda: copies_of(log, place, len(consumers)), what="no copy on the dead-letter topic")
    for record, headers in copies:
        if value is not None and len(value) > dead_letters.MAX_COPY_BYTES:
            assert record.value == b"" and headers["left_out_bytes"] == str(len(value))
        else:
            assert record.value == (value or b"")
        assert reason in headers["reason"]
        assert SECRET not in " ".join(headers.values())
    assert {headers["consumer"] for _, headers in copies} == consumers


def test_an_altered_sealed_part_is_given_up_and_a_retry_sends_the_true_event(log, episode_ids, send):
    log.supervisor.stop("relay")
    try:
        feedback_id = give(log, episode_ids[1], 1)
        (row,) = log.rows("SELECT key, value FROM outbox WHERE event_id = :id", id=feedback_id)
        forged = orjson.loads(row.value)
        head, _, tail = forged["data"]["sealed"].rpartition(".")
        forged["data"]["sealed"] = f"{head}.{tail[::-1]}"
        place = send(row.key.encode(), orjson.dumps(forged))
        letters = wait_until(lambda: letters_at(log, place))
    finally:
        log.supervisor.start("relay")
    # The receipts need nothing that is sealed.
    assert [(letter.consumer, letter.reason.count("seal_broken")) for letter in letters] == [("reward", 1)]
    wait_until(lambda: not log.rows("SELECT 1 FROM outbox WHERE published_at IS NULL"))
    cli("log", "dead", "retry", str(letters[0].id), report=False)
    added = "SELECT count(*) FROM reward_updates WHERE feedback_id = :id AND action = 'add'"
    wait_until(lambda: log.rows(added, id=feedback_id)[0][0] == 1, what="the true event was not learned")


def test_a_letter_that_the_relay_could_not_send_is_not_retried(log, episode_ids, send):
    large = send(b"k", event("feedback.given.v9", pad="x" * 9_000_000))
    odd = send(b"\x00\xff" + b"k" * 2_000, event("feedback.given.v9"))
    letters = wait_until(lambda: letters_at(log, large))
    assert "dead_letter_too_large" in cli_fails("log", "dead", "retry", str(letters[0].id))
    letters = wait_until(lambda: letters_at(log, odd))
    cli("log", "dead", "retry", str(letters[0].id), report=False)
    # A version that knows the schema would read it now; this one gives it up once more.
    query = "SELECT count(*) FROM dead_letters WHERE event_id = :id AND consumer = :consumer"
    of_letter = {"id": letters[0].event_id, "consumer": letters[0].consumer}
    wait_until(lambda: log.rows(query, **of_letter)[0][0] == 2, what="it was not sent again")
    assert len(cli("log", "dead", "list")["dead_letters"]) > 2


def give(log, episode_id, number):
    """Give a thumb through the API; return its id."""
    signal = {"episode_id": episode_id, "user": user_of(number), "kind": "thumb", "value": 1}
    body = json.dumps({**signal, "idempotency_key": uuid.uuid4().hex}).encode()
    return Client(log.settings).post("/v1/feedback", body)["id"]


def applied_by(log, event_id):
    rows = log.rows("SELECT consumer FROM consumed_events WHERE event_id = :id AND NOT dead_letter", id=event_id)
    return {row.consumer for row in rows}


def letters_at(log, place):
    return log.rows(
        "SELECT * FROM dead_letters WHERE topic = :topic AND partition = :partition AND \"offset\" = :offset",
        topic=place.topic, partition=place.partition, offset=place.offset,
    )  # fmt: skip


def copies_of(log, place, num_copies):
    """Return the copies of what was at a place, with their headers, once all are there."""
    found = []
    for record in all_records(log, dead_letter_topic(place.topic)):
        headers = {name: text.decode() for name, text in record.headers}
        if headers["place"] == f"{place.partition}/{place.offset}":
            found.append((record, headers))
    return found if len(found) == num_copies else None
