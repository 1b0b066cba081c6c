"""Raters who never give up: each signal is sent again, with the same body and key, until it is accepted."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from flows.bench.load import Client
from flows.bench.stack import write_episode
from infra.db import Sessions
from infra.errors import EverloopError
from infra.settings import Settings

NUM_USERS = 12
NUM_MESSAGES = 8
NUM_RATERS = 6
RATE_PER_S = 30.0
RETRY_PAUSE_S = 0.1
TIMEOUT_S = 10.0
# How often an accepted signal is sent once more, as by a client that missed the answer.
REPEATED_SHARE = 0.05
KINDS = ("thumb", "rating", "correction", "preference")
KIND_WEIGHTS = (50, 20, 15, 15)
WITHDRAWN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers that one user got to the same message."""

    user: str
    episodes: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What a rater holds in hand: the id of the signal, and when it was first sent (``time.monotonic``)."""

    feedback_id: str
    began_s: float


def write_pairs(sessions: Sessions) -> list[Pair]:
    """Write the episodes that will be rated; users share the texts, so that features are computed once each."""
    pairs = []
    with sessions.begin() as session:
        for user in (f"rater-{number}" for number in range(NUM_USERS)):
            for number in range(NUM_MESSAGES):
                ids = [
                    write_episode(session, user, number, answer)
                    for answer in (f"The number {number}.", f"{number} comes after {number - 1}, and is a number.")
                ]
                pairs.append(Pair(user, (ids[0], ids[1])))
    return pairs


def signals(pairs: list[Pair], seed: int, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield signals of all kinds that the reward model learns from: first ones, changes of mind, withdrawals."""
    draw = random.Random(seed)
    number = 0
    while True:
        pair = draw.choice(pairs)
        this, other = draw.sample(pair.episodes, 2)
        kind = draw.choices(KINDS, KIND_WEIGHTS)[0]
        withdrawn = draw.random() < WITHDRAWN_SHARE
        body: dict[str, Any] = {"episode_id": this, "user": pair.user, "kind": kind}
        if kind == "thumb":
            body["value"] = draw.choice((-1, 1))
        elif kind == "rating":
            body["value"] = draw.randint(1, 5)
        elif kind == "preference":
            body["over"] = other
        elif not withdrawn:
            body["text"] = f"It is a number, and {draw.choice(('odd', 'even'))}."
        if withdrawn:
            body["value"] = 0
        yield {**body, "idempotency_key": f"{prefix}-{number}"}
        number += 1


class Raters:
    """Several clients in the background, each with a connection and a list of what was acknowledged.

    Attributes
    ----------
    accepted
        By idempotency key.
    changed
        Keys under which a retry was answered with another id than before.
    answers
        How many answers there were of each status, and how many requests without an answer.
    """

    def __init__(self, settings: Settings, pairs: list[Pair], seed: int) -> None:
        self.settings = settings
        self.accepted: dict[str, Acknowledgement] = {}
        self.changed: list[str] = []
        self.answers: Counter[str] = Counter()
        self._failures: list[Exception] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._abandoned = False
        self._threads = [
            threading.Thread(target=self._run, args=(signals(pairs, seed * NUM_RATERS + n, f"r{n}"), seed + n))
            for n in range(NUM_RATERS)
        ]

    def __enter__(self) -> Self:
        """Begin to rate."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop rating, once what was begun is accepted; at once where the block failed."""
        self._abandoned = error is not None
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what stopped a rater, if anything did.

        Raises
        ------
        EverloopError
            Code ``bench_refused`` where the API refused a signal for good.
        """
        if self._failures:
            raise self._failures[0]

    def begun_after(self, moment_s: float) -> list[str]:
        """Return the ids of the accepted signals that were first sent after a moment."""
        with self._lock:
            return [ack.feedback_id for ack in self.accepted.values() if ack.began_s > moment_s]

    def _run(self, source: Iterator[dict[str, Any]], seed: int) -> None:
        client, draw = Client(self.settings, TIMEOUT_S), random.Random(seed)
        try:
            while not self._stop.wait(NUM_RATERS / RATE_PER_S):
                signal = next(source)
                self._send(client, signal)
                if draw.random() < REPEATED_SHARE:
                    self._send(client, signal)
        except Exception as error:
            self._failures.append(error)

    def _send(self, client: Client, signal: dict[str, Any]) -> None:
        body, key, began_s = json.dumps(signal).encode(), str(signal["idempotency_key"]), time.monotonic()
        while (answer := self._try(client, body)) is None:
            if self._abandoned:
                return
            time.sleep(RETRY_PAUSE_S)
        with self._lock:
            first = self.accepted.setdefault(key, Acknowledgement(answer["id"], began_s))
            if first.feedback_id != answer["id"]:
                self.changed.append(key)

    def _try(self, client: Client, body: bytes) -> dict[str, Any] | None:
        try:
            status, answer = client.exchange("/v1/feedback", body)
        except (OSError, http.client.HTTPException):
            status, answer = 0, {}
        with self._lock:
            self.answers[str(status or "none")] += 1
        if 400 <= status < 500:
            raise EverloopError(f"{status}: {answer}", code="bench_refused")
        return answer if status == 202 else None
