"""The engine's door: without the key nothing but whether it is well, and its counts.

vLLM's own ``--api-key`` guards paths under ``/v1`` and a few others. The routes of hosting standards that it also
has (``/adapters``, ``/invocations``) and ``/tokenize`` stay open: by the first, anybody could change what serves.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "EVERLOOP_ENGINE_KEY"
OPEN = frozenset({"/health", "/ping", "/metrics"})
REFUSAL = b'{"error": {"message": "This engine asks for a key.", "code": "key_needed"}}'
Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Door:
    """ASGI middleware for vLLM's ``--middleware``; without a key in the environment everybody comes in."""

    def __init__(self, app: App) -> None:
        self.app = app
        key = os.environ.get(KEY, "")
        self.expected = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if not self.expected or scope["type"] == "lifespan" or scope.get("path") in OPEN:
            await self.app(scope, receive, send)
            return
        shown = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        if secrets.compare_digest(shown, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send(
                {"type": "http.response.body", "body": b'{"error": {"message": "The engine asks for a key."}}'}
            )
