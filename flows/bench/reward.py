"""``everloop bench reward``: how well, how fast and how safely the reward model learns."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import sqlalchemy as sa

from feedback.acceptance import accept_many
from feedback.signals import read_signal
from flows.accounting import backlog
from flows.bench import attacks, sources
from flows.bench.log import wait_for
from flows.bench.pairs import batch_accuracy, differences, one_pass
from flows.bench.stack import log_stack, seed, user_of
from infra import report
from infra.db import Sessions
from infra.events import RaterRuled
from infra.settings import Settings, load
from reward import CONSUMER, replay, rulings
from reward.encoder import open_encoder
from reward.online import BayesianHead
from reward.tables import RewardUpdate
from reward.worker import RewardWorker

UPDATE_DIM = 577
UPDATES = 3_000
REPLAY_SIGNALS = 20_000
CHUNK_SIGNALS = 1_000
LATENCIES = 60
POLL_S = 0.004


def measure(pairs: Path | None, *, with_stack: bool = True) -> dict[str, Any]:
    """Return all figures.

    Parameters
    ----------
    pairs
        A gzip'd JSONL of preference pairs; without it, what needs one is left out.
    with_stack
        Whether to start the log's parts, for replay and latency.
    """
    settings = load()
    encoder = open_encoder(settings)
    found: dict[str, Any] = {"encoder": encoder.name}
    z = None if pairs is None else differences(settings, encoder, pairs)
    found |= _updates()
    if z is not None:
        report.say("one pass over the pairs")
        found |= one_pass(z, [1.0] * len(z), pairs=True)
        found |= batch_accuracy(z)
        report.say("attacks")
        found |= attacks.measure(z)
    report.say("other sources")
    found["arena"] = sources.arena()
    found["conversations"] = sources.conversations(settings, encoder)
    if with_stack:
        found |= _on_a_stack()
    return found


def _updates() -> dict[str, float]:
    head = BayesianHead.prior(UPDATE_DIM)
    rows = np.random.default_rng(0).normal(scale=0.2, size=(UPDATES, UPDATE_DIM))
    taken_ms = []
    for row in rows:
        started_s = time.perf_counter()
        head.learn_one(row, 1.0)
        taken_ms.append((time.perf_counter() - started_s) * 1000.0)
    return {
        "update_p50_ms": statistics.median(taken_ms),
        "update_p99_ms": float(np.percentile(taken_ms, 99)),
    }


def _on_a_stack() -> dict[str, float]:
    with log_stack() as (settings, sessions, supervisor):
        report.say("writing episodes")
        ids = seed(sessions, REPLAY_SIGNALS + 2 * LATENCIES)
        wait_for(sessions, CONSUMER, lambda session: backlog(session) == 0)
        found = _latencies(settings, sessions, ids[REPLAY_SIGNALS:])
        supervisor.stop("reward")
        report.say("writing signals")
        for start in range(0, REPLAY_SIGNALS, CHUNK_SIGNALS):
            with sessions.begin() as session:
                accept_many(session, [_thumb(n, ids[n]) for n in range(start, start + CHUNK_SIGNALS)])
        report.say("learning them from nothing")
        worker = RewardWorker(sessions, settings, open_encoder(settings))
        with sessions.begin() as session:
            rebuilt = replay.rebuild(worker, session)
        found |= {"replay_per_s": rebuilt.num_events / rebuilt.seconds, "replayed": rebuilt.num_signals}
        return found | _ban(worker, sessions)


def _ban(worker: RewardWorker, sessions: Sessions) -> dict[str, float]:
    """Time how long it takes until nothing of the loudest rater is in the posterior, committed."""
    loudest = max(worker.learner.raters.by_name.values(), key=lambda rater: rater.num_votes)
    started_s = time.perf_counter()
    with sessions.begin() as session:
        changes = rulings.follow(
            worker.learner, RaterRuled(rater=loudest.name, ruling="banned"), worker.book(session)
        )
        worker.report(session, changes)
        worker.commit(session)
    return {"ban_ms": (time.perf_counter() - started_s) * 1000.0, "ban_votes": len(changes)}


def _thumb(number: int, episode_id: str) -> Any:
    return read_signal.validate_python(
        {
            "kind": "thumb",
            "value": 1 if number % 3 else -1,
            "episode_id": episode_id,
            "user": user_of(number),
            "idempotency_key": f"bench-{number}",
        }
    )


def _latencies(settings: Settings, sessions: Sessions, ids: list[str]) -> dict[str, float]:
    """Time single signals, from the request to the committed score: known answers, and corrections of new text."""
    report.say("single signals")
    cached, computed = [], []
    options: dict[str, Any] = {"base_url": settings.need("public_url"), "headers": settings.credentials}
    with httpx.Client(timeout=60, trust_env=False, **options) as client:
        for n in range(LATENCIES):
            user, number = user_of(REPLAY_SIGNALS + n), REPLAY_SIGNALS + n
            thumb = {"kind": "thumb", "value": 1, "user": user, "idempotency_key": f"latency-{number}"}
            cached.append(_effect_ms(client, sessions, {**thumb, "episode_id": ids[n]}))
            text = f"The number {n} is the {n}th number, and it has {len(str(n))} digits. " * 3
            other = user_of(REPLAY_SIGNALS + LATENCIES + n)
            correction = {
                "kind": "correction",
                "text": text,
                "user": other,
                "idempotency_key": f"latency-c{number}",
            }
            computed.append(_effect_ms(client, sessions, {**correction, "episode_id": ids[LATENCIES + n]}))
    return {
        "cached_p50_ms": statistics.median(cached),
        "cached_p95_ms": float(np.percentile(cached, 95)),
        "computed_p50_ms": statistics.median(computed),
        "computed_p95_ms": float(np.percentile(computed, 95)),
    }


def _effect_ms(client: httpx.Client, sessions: Sessions, signal: dict[str, Any]) -> float:
    started_s = time.perf_counter()
    answer = client.post("/v1/feedback", json=signal).raise_for_status().json()
    learned = sa.select(RewardUpdate.seq).where(RewardUpdate.feedback_id == answer["id"])
    while True:
        with sessions() as session:
            if session.scalar(learned) is not None:
                return (time.perf_counter() - started_s) * 1000.0
        time.sleep(POLL_S)
