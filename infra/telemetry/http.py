"""Each HTTP request as a metric and, where traces are on, as a span.

Plain ASGI, because a middleware that wraps the response would hide the client's hanging up.
"""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.telemetry import tracing

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"  # refused at the door, or no route of ours: such paths are anybody's, and without number
STATIC = "/static"
HUNG_UP = 499  # as nginx writes it: the client was gone before there was an answer

REQUESTS = Counter(
    "everloop_http_requests", "HTTP requests, by route and class of status.", ["method", "route", "status"]
)
SECONDS = Histogram(
    "everloop_http_request_duration_seconds",
    "From a request's arrival to the last byte of its answer; a stream's whole length.",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
IN_FLIGHT = Gauge("everloop_http_requests_in_flight", "HTTP requests that are being answered.")


class Observed:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = HUNG_UP

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "other"
        started_s = time.perf_counter()
        IN_FLIGHT.inc()
        try:
            with tracing.span(method, "SERVER", _parent(scope), http__request__method=method) as span:
                try:
                    await self.app(scope, receive, send_noting)
                except Exception:
                    status = 500  # the framework answers so, further out
                    raise
                finally:
                    if span is not None:
                        span.rename(f"{method} {route_of(scope)}")
                        span.note(http__route=route_of(scope), http__response__status_code=status)
        finally:
            route = route_of(scope)
            IN_FLIGHT.dec()
            REQUESTS.labels(method, route, f"{status // 100}xx").inc()
            SECONDS.labels(method, route).observe(time.perf_counter() - started_s)


def route_of(scope: Scope) -> str:
    """Return the template of the route that a request took, never its path."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    return STATIC if scope.get("endpoint") is not None and scope["path"].startswith(f"{STATIC}/") else UNMATCHED


def _parent(scope: Scope) -> str | None:
    if not tracing.is_on():
        return None
    return tracing.valid(Headers(scope=scope).get(tracing.HEADER))
