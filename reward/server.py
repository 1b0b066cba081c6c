"""The reward worker's own HTTP address: scores and vectors. The gateway, which runs no model, asks here."""

from __future__ import annotations

import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from infra.connections import SERVER_IDLE_S
from infra.errors import EverloopError
from reward.embedding import Embedder
from reward.embedding_wire import EmbedRequest
from reward.scored import ScoreRequest
from reward.scoring import Scorer


def build(scorer: Scorer, embedder: Embedder) -> FastAPI:
    """Return the application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.post("/v1/rewards/score")
    def score(body: ScoreRequest) -> dict[str, Any]:
        answers = [([m.model_dump() for m in item.messages], item.answer) for item in body.items]
        return scorer.score(answers, [item.reference for item in body.items], body.snapshot_id)

    @app.post("/v1/embeddings")
    def embed(body: EmbedRequest) -> Response:
        made = embedder.embed(body.texts, is_awaited=body.is_awaited)
        return JSONResponse(made.model_dump())  # somebody waits: it is not checked again

    @app.exception_handler(EverloopError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, EverloopError)
        return JSONResponse(error.envelope(), status_code=error.status)

    return app


def serve(scorer: Scorer, embedder: Embedder, host: str, port: int) -> None:
    """Serve in a thread of its own, which ends with the process."""
    config = uvicorn.Config(
        build(scorer, embedder),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_keep_alive=SERVER_IDLE_S,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # the worker stops by itself
    threading.Thread(target=server.run, daemon=True).start()
