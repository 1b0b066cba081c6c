"""A load generator that costs little: it shares two cores with what it measures."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from infra.errors import EverloopError
from infra.settings import Settings


@dataclass(slots=True)
class Sent:
    """What was sent, when, and how long the answer took.

    Attributes
    ----------
    started_s
        By id of the accepted signal: when its request began (``time.time``).
    latencies_ms
        From the request to its answer.
    """

    started_s: dict[str, float] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)


MAX_IDLE_S = 3.0


class Client:
    """One connection that is kept open."""

    def __init__(self, settings: Settings, timeout_s: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection(
            urlsplit(settings.need("public_url")).netloc, timeout=timeout_s
        )
        self._headers = {"Content-Type": "application/json", **settings.credentials}
        self._used_s = time.monotonic()

    def exchange(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Send a JSON body and return the status and the answer.

        Raises
        ------
        OSError, http.client.HTTPException
            Where there is no answer; the next request opens the connection anew.
        """
        # The server closes what is idle for five seconds; a request on its way just then would be lost.
        if time.monotonic() - self._used_s > MAX_IDLE_S:
            self._connection.close()
        self._used_s = time.monotonic()
        try:
            self._connection.request("POST", path, body, self._headers)
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        """Send a JSON body and return the answer.

        Raises
        ------
        EverloopError
            Where it is not 202.
        """
        status, answer = self.exchange(path, body)
        if status != 202:
            raise EverloopError(f"{status}: {answer}", code="bench_refused")
        return answer


def singles(
    settings: Settings, bodies: Iterable[bytes], *, num_clients: int, seconds: float, rate_per_s: float | None
) -> Sent:
    """Send signals one by one over several connections.

    Parameters
    ----------
    rate_per_s
        How many begin each second, whatever the answers take; as many as can be, if unset.
    """
    sent, lock = Sent(), threading.Lock()
    source, began_s = iter(bodies), time.time()
    count = 0

    def next_one() -> tuple[bytes, float] | None:
        nonlocal count
        with lock:
            due_s = began_s + count / rate_per_s if rate_per_s else time.time()
            body = next(source, None) if due_s < began_s + seconds else None
            count += 1
            return None if body is None else (body, due_s)

    def run() -> None:
        client = Client(settings)
        while (following := next_one()) is not None:
            body, due_s = following
            time.sleep(max(0.0, due_s - time.time()))
            started_s = time.time()
            accepted = client.post("/v1/feedback", body)
            with lock:
                sent.started_s[accepted["id"]] = min(due_s, started_s)
                sent.latencies_ms.append((time.time() - min(due_s, started_s)) * 1000.0)

    _together(run, num_clients)
    return sent


def batches(settings: Settings, bodies: Iterator[bytes], *, num_clients: int, seconds: float) -> Sent:
    """Send batches over several connections, as many as can be."""
    sent, lock, ends_s = Sent(), threading.Lock(), time.time() + seconds

    def run() -> None:
        client = Client(settings)
        while time.time() < ends_s:
            with lock:
                body = next(bodies, None)
            if body is None:
                return
            started_s = time.time()
            answer = client.post("/v1/feedback/batch", body)
            with lock:
                for item in answer["results"]:
                    sent.started_s[item["accepted"]["id"]] = started_s
                sent.latencies_ms.append((time.time() - started_s) * 1000.0)

    _together(run, num_clients)
    return sent


def _together(run: Callable[[], None], num_threads: int) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
