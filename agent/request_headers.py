"""The headers that clients of OpenAI's API look for: which request it was, how long it took, what is left.

Plain ASGI, because a middleware that wraps the response would hide the client's hanging up.
"""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.ids import new_id

log = logging.getLogger("everloop.agent")


class RequestHeaders:
    """ASGI middleware that adds them to whatever is answered under ``/v1``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        request_id, started_s = new_id("req"), time.perf_counter()
        state = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started_s) * 1000.0))
                headers.update(state.get("rate_limits") or {})
                if message["status"] >= 500:
                    log.warning("%s was answered with %s", request_id, message["status"])
            await send(message)

        await self.app(scope, receive, send_with_headers)
