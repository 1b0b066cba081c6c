"""A proxy before a real engine that misbehaves in the ways that replicas do, and engines of a test's own."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.connections import SERVER_IDLE_S
from infra.settings import BASE_MODEL_NAME, Settings
from infra.stack.parts import embedded_parts


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Engine:
    """A vLLM server, started as the stack starts its own."""

    settings: Settings
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.settings.engine_port}"

    def start(self) -> None:
        """Start it; :meth:`wait` waits until it answers."""
        part = next(part for part in embedded_parts(self.settings, {"engine_url"}) if part.name == "engine")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                part.command, env={**os.environ, **part.environment}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, timeout_s: float = 240.0) -> None:
        """Wait until it answers."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline_s, "the engine did not start"
            time.sleep(0.3)

    def kill(self) -> None:
        """Kill it, and all that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()


@dataclass
class Tamper:
    """The proxy.

    Attributes
    ----------
    mode
        ``honest``; ``lies``: says that adapters are loaded, and answers as the base model; ``hangs`` in a load;
        ``dies`` in a load (`kill` is called); ``breaks`` off each answer after its first chunks; ``mute``: takes
        questions and answers none.
    seen
        Models that were asked to chat.
    """

    upstream: Callable[[], str]
    mode: str = "honest"
    kill: Callable[[], None] = lambda: None
    seen: list[str] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, in a thread."""
        app = Starlette(routes=[Route("/{path:path}", self._handle, methods=["GET", "POST"])])
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="error", timeout_keep_alive=SERVER_IDLE_S)
        )
        threading.Thread(target=self.server.run, daemon=True).start()

    def stop(self) -> None:
        """Stop serving."""
        self.server.should_exit = True

    async def _handle(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        if path == "/v1/chat/completions" and self.mode == "mute":
            self.seen.append(json.loads(body)["model"])
            await asyncio.sleep(3600)
        if path == "/v1/load_lora_adapter" and self.mode != "honest":
            name = json.loads(body)["lora_name"]
            if self.mode == "lies":
                self.claimed.add(name)
                return PlainTextResponse(f"Success: LoRA adapter '{name}' added.")
            if self.mode == "hangs":
                await asyncio.sleep(3600)
            if self.mode == "dies":
                self.kill()
        if path == "/v1/unload_lora_adapter" and json.loads(body)["lora_name"] in self.claimed:
            self.claimed.discard(json.loads(body)["lora_name"])
            return PlainTextResponse("Success")
        return await self._forward(request, path, self._as_told(path, body))

    claimed: set[str] = field(default_factory=set)

    def _as_told(self, path: str, body: bytes) -> bytes:
        if not path.endswith("/completions"):
            return body
        asked: dict[str, Any] = json.loads(body)
        if path == "/v1/chat/completions":
            self.seen.append(asked["model"])
        if asked["model"] in self.claimed:
            asked["model"] = BASE_MODEL_NAME
        return json.dumps(asked).encode()

    async def _forward(self, request: Request, path: str, body: bytes) -> Response:
        client = httpx.AsyncClient(timeout=60, trust_env=False)
        upstream = f"{self.upstream()}{path}"
        try:
            answer = await client.send(
                client.build_request(
                    request.method, upstream, content=body, headers={"Content-Type": "application/json"}
                ),
                stream=True,
            )
        except httpx.TransportError:
            await client.aclose()
            return PlainTextResponse("gone", status_code=502)
        if path == "/v1/models" and self.claimed:
            listed = json.loads(await answer.aread())
            listed["data"] += [{"id": name} for name in self.claimed]
            return Response(json.dumps(listed), media_type="application/json")

        async def blocks() -> AsyncIterator[bytes]:
            number = 0
            async for block in answer.aiter_raw():
                yield block
                number += 1
                if self.mode == "breaks" and number > 3:
                    raise RuntimeError("broken off by the test")

        async def close() -> None:
            await answer.aclose()
            await client.aclose()

        media_type = answer.headers.get("content-type")
        return StreamingResponse(
            blocks(), answer.status_code, media_type=media_type, background=BackgroundTask(close)
        )
