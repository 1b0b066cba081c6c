"""``POST /v1/chat/completions``, ``GET /v1/models`` and the chat page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from agent.answers import chunk, completion, handed_over, last_chunk, step_chunk
from agent.book import unknown_model
from agent.choices import Choices
from agent.exchange import choices_for, sse, streamed, whole
from agent.schema import ChatRequest, StreamOptions
from deploy.tables import Release
from feedback.identity import UserHeader
from infra.access.gate import SignedIn, needs
from infra.access.roles import Role
from infra.db import transaction
from infra.engine import LATEST, RUN_PREFIX
from infra.errors import EverloopError
from infra.settings import ASSISTANT_MODEL
from infra.text import CleanText

STATIC_DIR = Path(__file__).parent / "static"

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


@router.get("/v1/models/{model:path}")
async def get_model(model: CleanText, request: Request) -> dict[str, Any]:
    """Return one of the models that are listed."""
    for listed in (await list_models(request))["data"]:
        if listed["id"] == model:
            found: dict[str, Any] = listed
            return found
    raise unknown_model(model)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(
    body: ChatRequest, caller: SignedIn, request: Request, x_everloop_user: UserHeader = None
) -> Response:
    """Answer. The response's ``id`` is the episode's id; with ``n`` above 1, that of the first choice's episode."""
    choices = await choices_for(body, caller, request, x_everloop_user)
    if not body.stream:
        return await whole(choices, caller, request, lambda: completion(choices.turns))
    return await streamed(choices, caller, request, chat_events(choices, body.stream_options or StreamOptions()))


async def chat_events(choices: Choices, options: StreamOptions) -> AsyncIterator[str]:
    """Yield chat completion chunks."""
    seen: set[int] = set()
    try:
        async with aclosing(choices.deltas()) as deltas:  # type: ignore[type-var]
            async for turn, text in deltas:
                for step in turn.take_news() if options.include_steps else ():
                    yield sse(step_chunk(choices.first, turn, step))
                if text == "":
                    continue
                delta: dict[str, Any] = {} if turn.index in seen else {"role": "assistant"}
                seen.add(turn.index)
                if text is not None:
                    delta["content"] = text
                if text is None and (calls := handed_over(turn)):
                    yield sse(chunk(choices.first, turn, {**delta, "tool_calls": calls}))
                    delta = {}
                reason = turn.recording.finish_reason if text is None else None
                yield sse(chunk(choices.first, turn, delta, reason))
    except EverloopError as error:
        yield sse(error.envelope())
        return
    if options.include_usage:
        yield sse(last_chunk(choices.turns))
    yield "data: [DONE]\n\n"
