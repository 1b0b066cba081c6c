"""``everloop bench log``: from the HTTP request to the effect that a consumer committed, on the embedded stack."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.projection import CONSUMER as RECEIPTS
from flows.accounting import backlog
from flows.bench import load
from flows.bench.stack import log_stack, seed, user_of
from infra import kafka, report
from infra.db import Sessions
from infra.errors import EverloopError
from infra.events import FeedbackGiven
from infra.log import metrics, outbox
from infra.log.outbox import Entry
from infra.log.relay import Relay
from infra.sealing import SubjectKey
from infra.settings import Settings
from infra.tables import ConsumedEvent, OutboxRow
from reward import CONSUMER as REWARD

NUM_CLIENTS = 16
BATCH_SIGNALS = 500
NUM_BATCH_CLIENTS = 3
MAX_SINGLES_PER_S = 1500
MAX_BATCHED_PER_S = 8000
LATENCY_RATE_PER_S = 200.0
POST_RATE_PER_S = 100.0
DRAIN_TIMEOUT_S = 300.0
POLL_S = 0.02
RELAY_EVENTS = 20_000
RELAY_ROUNDS = 3


def measure(seconds: float) -> dict[str, Any]:
    """Run all parts of the bench and return the figures.

    Effects are those of the reward model for single signals, and of the receipts for batches: an update of the
    posterior alone takes 0.3 ms, so the reward model's share of a batch is printed beside it.
    """
    with log_stack() as (settings, sessions, supervisor):
        report.say("writing episodes")
        num_singles = int((MAX_SINGLES_PER_S + 700) * seconds)
        ids = seed(sessions, num_singles + int(MAX_BATCHED_PER_S * seconds))
        wait_for(sessions, REWARD, lambda session: backlog(session) == 0)
        bodies = map(_body, itertools.count(), ids[:num_singles])
        report.say(f"single signals, {NUM_CLIENTS} clients, as many as can be")
        load.singles(settings, bodies, num_clients=NUM_CLIENTS, seconds=2.0, rate_per_s=None)  # warm-up
        _until_quiet(sessions, REWARD)
        began_s = time.time()
        sent = load.singles(settings, bodies, num_clients=NUM_CLIENTS, seconds=seconds, rate_per_s=None)
        accepted_s = time.time() - began_s
        _until_quiet(sessions, REWARD)
        end_to_end_per_s = len(sent.started_s) / (time.time() - began_s)
        result: dict[str, Any] = {
            "end_to_end_per_s": end_to_end_per_s,
            "accepted_per_s": len(sent.started_s) / accepted_s,
            "num_singles": len(sent.started_s),
        }
        report.say(f"single signals at {LATENCY_RATE_PER_S:.0f} a second")
        latencies_ms = _effects(sessions, settings, bodies, seconds, LATENCY_RATE_PER_S)
        result |= {"latency_rate_per_s": LATENCY_RATE_PER_S, **_quantiles("latency", latencies_ms)}
        _until_quiet(sessions, REWARD)
        report.say(f"single signals at {POST_RATE_PER_S:.0f} a second")
        sent = load.singles(settings, bodies, num_clients=NUM_CLIENTS, seconds=seconds, rate_per_s=POST_RATE_PER_S)
        result |= _quantiles("post", sent.latencies_ms)
        _until_quiet(sessions, REWARD)
        result |= _batches(sessions, settings, ids[num_singles:], seconds)
        for part in ("api", "ledger", "reward", "relay"):
            supervisor.stop(part)
        result |= _relay(settings, sessions)
    return result


def _body(number: int, episode_id: str) -> bytes:
    return json.dumps(_thumb(number, episode_id)).encode()


def _thumb(number: int, episode_id: str) -> dict[str, Any]:
    return {
        "episode_id": episode_id,
        "user": user_of(number),
        "kind": "thumb",
        "value": 1 if number % 3 else -1,
        "idempotency_key": f"bench-{number}",
    }


def _effects(
    sessions: Sessions, settings: Settings, bodies: Iterator[bytes], seconds: float, rate_per_s: float
) -> list[float]:
    """Send at a rate while looking for effects; return the time from each request to its effect.

    Looking happens every 20 ms, so the figures are up to that much too high, never too low.
    """
    seen_s: dict[str, float] = {}
    stop = threading.Event()

    def look() -> None:
        query = sa.select(ConsumedEvent.event_id).where(
            ConsumedEvent.consumer == REWARD, ConsumedEvent.consumed_at > sa.bindparam("since")
        )
        while not stop.is_set():
            with sessions() as session:
                since = session.scalar(sa.select(sa.func.now() - sa.text("interval '2 seconds'")))
                found = session.scalars(query, {"since": since}).all()
            now_s = time.time()
            for event_id in found:
                seen_s.setdefault(event_id, now_s)
            stop.wait(POLL_S)

    looker = threading.Thread(target=look)
    looker.start()
    sent = load.singles(settings, bodies, num_clients=NUM_CLIENTS, seconds=seconds, rate_per_s=rate_per_s)
    deadline_s = time.time() + DRAIN_TIMEOUT_S
    while not sent.started_s.keys() <= seen_s.keys() and time.time() < deadline_s:
        time.sleep(POLL_S)
    stop.set()
    looker.join()
    return [(seen_s[i] - started_s) * 1000.0 for i, started_s in sent.started_s.items()]


def _batches(sessions: Sessions, settings: Settings, ids: list[str], seconds: float) -> dict[str, Any]:
    report.say(f"batches of {BATCH_SIGNALS}, {NUM_BATCH_CLIENTS} clients")
    numbered = [_thumb(number, episode_id) for number, episode_id in enumerate(ids)]
    for number, signal in enumerate(numbered):
        signal["idempotency_key"] = f"batch-{number}"
    bodies = [
        json.dumps({"signals": numbered[start : start + BATCH_SIGNALS]}).encode()
        for start in range(0, len(numbered), BATCH_SIGNALS)
    ]
    with sessions() as session:
        applied_before = _num_applied(session, REWARD)
    began_s = time.time()
    sent = load.batches(settings, iter(bodies), num_clients=NUM_BATCH_CLIENTS, seconds=seconds)
    _until_quiet(sessions, RECEIPTS)
    receipts_s = time.time() - began_s
    with sessions() as session:
        applied = _num_applied(session, REWARD) - applied_before
    _until_quiet(sessions, REWARD)
    return {
        "batch_per_s": len(sent.started_s) / receipts_s,
        "batch_num_signals": len(sent.started_s),
        "batch_reward_share": applied / len(sent.started_s),
        "batch_reward_per_s": len(sent.started_s) / (time.time() - began_s),
    }


def _num_applied(session: Session, consumer: str) -> int:
    return int(session.scalar(sa.select(sa.func.count()).where(ConsumedEvent.consumer == consumer)) or 0)


def _until_quiet(sessions: Sessions, consumer: str) -> None:
    """Wait until a consumer has applied every signal that the outbox holds; looking must cost next to nothing."""
    waiting = sa.select(sa.func.count()).where(
        OutboxRow.published_at.is_(None), OutboxRow.topic == FeedbackGiven.topic
    )

    def quiet(session: Session) -> bool:
        lags = [lag for lag in metrics.read(session).lags if lag.topic == FeedbackGiven.topic]
        return not session.scalar(waiting) and not any(lag.records for lag in lags if lag.consumer == consumer)

    wait_for(sessions, consumer, quiet)


def wait_for(sessions: Sessions, consumer: str, done: Callable[[Session], bool]) -> None:
    """Wait until a consumer has done something."""
    deadline_s = time.time() + DRAIN_TIMEOUT_S
    while True:
        with sessions() as session:
            if done(session):
                return
        if time.time() > deadline_s:
            raise EverloopError(f"{consumer} did not apply everything in time.", code="bench_stuck")
        time.sleep(0.05)


def _relay(settings: Settings, sessions: Sessions) -> dict[str, Any]:
    """Time the relay alone and a plain producer with the same bytes, in turns."""
    report.say("the relay alone, beside a plain producer")
    relay_per_s, plain_per_s = [], []
    relay = Relay(sessions, settings)
    with sessions.kw["bind"].connect() as connection:
        relay.connect(connection)
        for round_number in range(RELAY_ROUNDS):
            values = _fill(sessions, round_number)
            began_s = time.perf_counter()
            while relay.publish_batch(connection):
                pass
            relay_per_s.append(len(values) / (time.perf_counter() - began_s))
            producer = kafka.producer(settings.need("kafka_bootstrap"))
            began_s = time.perf_counter()
            for key, value in values:
                producer.send(FeedbackGiven.topic, key=key.encode(), value=value)
            producer.flush()
            plain_per_s.append(len(values) / (time.perf_counter() - began_s))
            producer.close()
    relay.close()
    return {
        "relay_per_s": statistics.median(relay_per_s),
        "plain_producer_per_s": statistics.median(plain_per_s),
        "relay_ratio": statistics.median(r / p for r, p in zip(relay_per_s, plain_per_s, strict=True)),
        "relay_event_bytes": statistics.mean(len(value) for _, value in values),
    }


def _fill(sessions: Sessions, round_number: int) -> list[tuple[str, bytes]]:
    key = SubjectKey("sk_bench", bytes(32))
    entries = [
        Entry(
            FeedbackGiven(
                feedback_id=f"fb_{round_number}_{n}",
                seq=n,
                episode_id=f"ep_{n % 1000:032x}",
                user_id="user",
                kind="thumb",
                value=1,
            ),
            f"ep_{n % 1000:032x}",
            f"fb_{round_number}_{n}",
            key,
        )
        for n in range(RELAY_EVENTS)
    ]
    with sessions.begin() as session:
        outbox.append_many(session, entries)
    with sessions() as session:
        rows = session.execute(
            sa.select(OutboxRow.key, OutboxRow.value)
            .where(OutboxRow.published_at.is_(None), OutboxRow.topic == FeedbackGiven.topic)
            .order_by(OutboxRow.seq)
        )
        return [(row.key, row.value) for row in rows]


def _quantiles(name: str, values_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_ms, n=100)
    return {f"{name}_p50_ms": cuts[49], f"{name}_p95_ms": cuts[94], f"{name}_p99_ms": cuts[98]}
