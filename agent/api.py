"""``POST /v1/chat/completions``, ``GET /v1/models`` and the chat page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from agent.schema import ChatRequest, chunk, completion, usage
from agent.turn import Turn
from deploy.tables import Release
from infra.access.gate import SignedIn, needs
from infra.access.roles import ANONYMOUS, Caller, Role
from infra.db import transaction
from infra.engine import LATEST, RUN_PREFIX
from infra.errors import EverloopError, ForbiddenError, UnavailableError
from infra.settings import ASSISTANT_MODEL

STATIC_DIR = Path(__file__).parent / "static"
STOPPING_POLL_S = 0.25

HUNG_UP = 499  # nobody is there to read it

router = APIRouter(tags=["assistant"], dependencies=[needs(Role.USER)])
public = APIRouter(dependencies=[needs(None)], include_in_schema=False)


@router.get("/", include_in_schema=False)
@router.get("/c/{conversation_id}", include_in_schema=False)
def chat_page() -> FileResponse:
    """Serve the chat page; which conversation it shows is for its script to read from the address."""
    return FileResponse(STATIC_DIR / "index.html")


@router.get("/docs", include_in_schema=False)
def api_page() -> FileResponse:
    """Serve the API's documentation."""
    return FileResponse(STATIC_DIR / "api.html")


@router.get("/taught", include_in_schema=False)
def taught_page() -> FileResponse:
    """Serve the page on which people see what became of what they said, and ask to be forgotten."""
    return FileResponse(STATIC_DIR / "taught.html")


@router.get("/account", include_in_schema=False)
def account_page() -> FileResponse:
    """Serve the page of one's account: password, keys, signing out."""
    return FileResponse(STATIC_DIR / "account.html")


@public.get("/login")
def login_page() -> FileResponse:
    """Serve the page on which one signs in."""
    return FileResponse(STATIC_DIR / "login.html")


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the assistant, releases that a replica has proved to serve, and runs to be tried while they train."""
    state = request.app.state
    held = await state.fleet.models()

    def known() -> list[Release]:
        with transaction(state.sessions) as session:
            return list(session.scalars(sa.select(Release).order_by(Release.id)))

    releases = await anyio.to_thread.run_sync(known)
    models = [{"id": ASSISTANT_MODEL, "object": "model", "created": 0, "owned_by": "everloop"}]
    models += [
        {"id": r.name, "object": "model", "created": int(r.created_at.timestamp()), "owned_by": "everloop"}
        for r in releases
        if state.fleet.routes(r.name)
    ]
    runs = sorted({name.partition("@")[0] for name in held if name.startswith(RUN_PREFIX)})
    models += [{"id": f"{run}@{LATEST}", "object": "model", "created": 0, "owned_by": "everloop"} for run in runs]
    return {"object": "list", "data": models}


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, caller: SignedIn, request: Request) -> Response:
    """Answer. The response's ``id`` is the episode's id."""
    state = request.app.state
    body.user = caller.speaks_for(body.user) or ANONYMOUS
    if body.model != ASSISTANT_MODEL and not caller.role.reaches(Role.RATER):
        raise ForbiddenError(
            f"Use the model {ASSISTANT_MODEL!r}; to ask for a release by its name needs the role rater.",
            code="role_needed",
            param="model",
        )
    state.gate.limits.check_tokens(caller)
    turn = Turn(state.book, state.fleet, state.settings, body, state.must_end)
    if not body.stream:
        return await _whole_answer(turn, caller, request)
    if not await _while_there(request, turn.begin):
        await turn.close()  # it may have begun in the same moment
        return Response(status_code=HUNG_UP)
    return TurnStream(turn, BackgroundTask(_afterwards, request, caller, turn))


class TurnStream(StreamingResponse):
    """A turn as server-sent events, closed with them: that the client hung up reaches the engine at once."""

    def __init__(self, turn: Turn, background: BackgroundTask) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            _server_sent_events(turn), media_type="text/event-stream", headers=headers, background=background
        )
        self.turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.turn.close()  # of a client who hung up before the first event, nothing was iterated

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def _server_sent_events(turn: Turn) -> AsyncIterator[str]:
    recording = turn.recording
    identity = (recording.episode_id, turn.created, recording.release)
    role: dict[str, Any] = {"role": "assistant"}
    try:
        async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
            async for text in deltas:
                yield _sse(chunk(*identity, {**role, "content": text}))
                role = {}
    except EverloopError as error:
        yield _sse(error.envelope())
        return
    yield _sse(chunk(*identity, role, recording.finish_reason))
    if turn.body.stream_options and turn.body.stream_options.include_usage:
        used = usage(recording.num_prompt_tokens, len(recording.token_ids))
        yield _sse({**chunk(*identity, {}), "choices": [], "usage": used})
    yield "data: [DONE]\n\n"


async def _while_there(request: Request, work: Callable[[], Awaitable[None]]) -> bool:
    """Do the work while the client waits for it, be it in the queue; return False where it hung up instead."""
    is_gone = False
    async with anyio.create_task_group() as tasks:

        async def watch_client() -> None:
            nonlocal is_gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            is_gone = True
            tasks.cancel_scope.cancel()

        error: EverloopError | None = None

        async def watch_server() -> None:
            nonlocal error
            while not request.app.state.must_end():
                await anyio.sleep(STOPPING_POLL_S)
            error = UnavailableError("The server is being started anew; ask again.", code="server_stopping")
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch_client)
        tasks.start_soon(watch_server)
        try:
            await work()
        except EverloopError as caught:  # out of here it would be a group of one
            error = caught
        tasks.cancel_scope.cancel()
    if error is not None:
        raise error
    return not is_gone


async def _afterwards(request: Request, caller: Caller, turn: Turn) -> None:
    """Do what the client need not wait for."""
    if not turn.has_begun:
        return
    state, recording = request.app.state, turn.recording
    state.gate.limits.count_tokens(caller, recording.num_prompt_tokens + len(recording.token_ids))
    await state.self_evaluator.offer(recording)


async def _whole_answer(turn: Turn, caller: Caller, request: Request) -> Response:
    async def generate() -> None:
        await turn.begin()
        async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
            async for _ in deltas:
                pass

    if not await _while_there(request, generate):
        await turn.close()
        return Response(status_code=HUNG_UP, background=BackgroundTask(_afterwards, request, caller, turn))
    recording = turn.recording
    used = usage(recording.num_prompt_tokens, len(recording.token_ids))
    return JSONResponse(
        completion(
            recording.episode_id,
            turn.created,
            recording.release,
            recording.answer,
            recording.finish_reason,
            used,
        ),
        background=BackgroundTask(_afterwards, request, caller, turn),
    )


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
