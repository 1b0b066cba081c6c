"""An engine that says what a test tells it to, in vLLM's wire format; and the API on it, without a stack."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from agent.app import build_app
from deploy.tables import Attestation
from infra.connections import SERVER_IDLE_S
from infra.settings import Settings

Script = Callable[[dict[str, Any], int], str]
"""What choice `i` of a request says."""


class ScriptedEngine:
    """Answers word by word; keeps what it was asked.

    Attributes
    ----------
    asked
        The bodies of all requests, the oldest first.
    """

    def __init__(self, script: Script = lambda payload, choice: "Blue is a colour.") -> None:
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.refuse: tuple[int, str] | None = None
        self.pause_s = 0.0
        self.breaks_after: int | None = None
        app = FastAPI()
        app.post("/v1/chat/completions")(self._chat)
        app.post("/v1/completions")(self._completions)
        app.get("/metrics")(lambda: PlainTextResponse(""))
        app.get("/v1/models")(lambda: {"data": [{"id": "base"}]})
        self.app = app

    async def _chat(self, request: Request) -> Response:
        return await self._answer(await request.json(), "message")

    async def _completions(self, request: Request) -> Response:
        return await self._answer(await request.json(), "text")

    async def _answer(self, payload: dict[str, Any], form: str) -> Response:
        self.asked.append(payload)
        if self.refuse:
            status, message = self.refuse
            return JSONResponse({"error": {"message": message}}, status_code=status)
        if payload.get("stream"):
            return StreamingResponse(self._stream(payload, form), media_type="text/event-stream")
        choices = []
        for index in range(payload.get("n", 1)):
            words = _words(self.script(payload, index))
            text = "".join(words)
            said = {"text": text} if form == "text" else {"message": {"role": "assistant", "content": text}}
            told = _told(payload, words, form)
            ids = list(range(10, 10 + len(words)))
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": told,
                    "finish_reason": _reason(payload, words),
                    "token_ids": ids,
                }
            )
        if form == "text":
            choices[0]["prompt_token_ids"] = [1, 2, 3]
        return JSONResponse({"choices": choices, "prompt_token_ids": [1, 2, 3]})

    def _stream(self, payload: dict[str, Any], form: str) -> Iterator[str]:
        words = _words(self.script(payload, 0))
        for number, word in enumerate(words):
            if self.pause_s:
                time.sleep(self.pause_s)
            if self.breaks_after == number:
                yield 'data: {"error": {"message": "gone"}}\n\n'
                return
            said = {"text": word} if form == "text" else {"delta": {"content": word}}
            is_last = number == len(words) - 1
            choice = {"index": 0, **said, "logprobs": _told(payload, [word], form), "token_ids": [10 + number]}
            choice["finish_reason"] = _reason(payload, words) if is_last else None
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        used = {"prompt_tokens": 3, "completion_tokens": len(words)}
        yield f"data: {json.dumps({'choices': [], 'usage': used})}\n\ndata: [DONE]\n\n"


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word if number == 0 else f" {word}" for number, word in enumerate(words)]


def _reason(payload: dict[str, Any], words: list[str]) -> str:
    return "length" if payload["max_tokens"] <= len(words) else "stop"


def _told(payload: dict[str, Any], words: list[str], form: str) -> dict[str, Any]:
    if form == "text":
        tops = [{word: -0.5} for word in words] if payload["logprobs"] else None
        return {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": tops}
    others = [{"token": "x", "logprob": -1.0, "bytes": [120]}] * payload.get("top_logprobs", 0)
    return {
        "content": [{"token": w, "logprob": -0.5, "bytes": list(w.encode()), "top_logprobs": others} for w in words]
    }


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application on a port of its own; yield its address."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="error", lifespan="on", timeout_keep_alive=SERVER_IDLE_S
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the application did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def api_on(engine: ScriptedEngine, database: Any, home: Any, **options: Any) -> Iterator[httpx.Client]:
    """Serve the API on a database and an engine that has proved the base model; yield a client of an operator."""
    with served(engine.app) as engine_url:
        with database.begin() as session:
            session.merge(Attestation(release="base", replica=engine_url, served_as="base", probe=[]))
        url = database.kw["bind"].url.render_as_string(hide_password=False)
        own = {"database_url": url, "engine_url": engine_url, "public_url": "http://127.0.0.1", "access": "open"}
        settings = Settings(home=home, **{**own, "self_evaluation": False, **options})
        with (
            served(build_app(settings)) as address,
            httpx.Client(base_url=address, timeout=30, trust_env=False) as client,
        ):
            yield client
