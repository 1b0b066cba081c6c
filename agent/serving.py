"""The API's server, which ends what is in hand before it stops, and is soon gone all the same.

supervisord kills what is not gone after :data:`infra.stack.supervisor.STOP_WAIT_S`; so an answer that would take
longer is ended before: its reader gets a whole response, which says that it was cut.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from infra.connections import SERVER_IDLE_S

LAST_ARRIVALS_S = 0.2  # who was connected in the last moment still gets to ask
ANSWERS_END_S = 5.0
GRACE_S = 7.0  # then what is left is broken off


class Server(uvicorn.Server):  # type: ignore[misc]
    """Uvicorn's server, which knows since when it is stopping."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # whom to believe, `trusted_proxies` says
            timeout_keep_alive=SERVER_IDLE_S,
            timeout_graceful_shutdown=math.ceil(GRACE_S),
        )
        super().__init__(config)
        self._stopping_since_s = math.inf
        app.state.is_stopping = self.is_stopping
        app.state.must_end = self.must_end

    def is_stopping(self) -> bool:
        """Tell whether it was told to stop; streams without an end look at it."""
        return bool(self.should_exit)

    def must_end(self) -> bool:
        """Tell whether answers in hand must end now."""
        return time.monotonic() - self._stopping_since_s >= ANSWERS_END_S

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note when it was told to stop."""
        self._stopping_since_s = min(self._stopping_since_s, time.monotonic())
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nobody any more, hear whom it has just accepted, and then close what is idle."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_ARRIVALS_S)
        await super().shutdown(sockets)
