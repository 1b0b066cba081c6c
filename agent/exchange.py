"""From a request to its answer over HTTP, whole or streamed, whichever of OpenAI's routes it came by."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from agent.best_of import step_of
from agent.choices import Choices
from agent.schema import ChatRequest
from agent.turn import Turn, Waited
from feedback.identity import named
from infra.access.roles import Caller, Role
from infra.errors import EverloopError, ForbiddenError, UnavailableError
from infra.settings import ASSISTANT_MODEL

STOPPING_POLL_S = 0.25
HUNG_UP = 499  # nobody is there to read it


async def choices_for(
    body: ChatRequest,
    caller: Caller,
    request: Request,
    user_header: str | None,
    turn_type: type[Turn] = Turn,
    waited: Waited | None = None,
) -> Choices:
    """Return the turns that are to answer a request; none has begun.

    Raises
    ------
    ForbiddenError
        Codes ``not_you`` and ``role_needed``.
    TooManyError
    """
    state = request.app.state
    body.user = body.for_whom(caller, named(user_header))
    if body.model != ASSISTANT_MODEL and not caller.role.reaches(Role.RATER):
        raise ForbiddenError(
            f"Use the model {ASSISTANT_MODEL!r}; to ask for a release by its name needs the role rater.",
            code="role_needed",
            param="model",
        )
    state.gate.limits.check_tokens(caller)
    given = (state.book, state.fleet, state.settings, body, state.must_end)
    # Of what is streamed the first word cannot wait for the choice; whoever asks for several chooses themselves.
    best = state.best_of if turn_type is Turn and body.n == 1 and not body.stream else None
    toolbox = state.toolbox if turn_type is Turn else None
    return Choices([turn_type(*given, index, best, toolbox=toolbox, waited=waited) for index in range(body.n)])


async def whole(
    choices: Choices, caller: Caller, request: Request, answer: Callable[[], dict[str, Any]]
) -> Response:
    """Have all answers, and return what `answer` makes of them."""
    afterwards = BackgroundTask(_afterwards, request, caller, choices)
    if not await _while_there(request, choices.finish):
        await choices.close()
        return Response(status_code=HUNG_UP, background=afterwards)
    return JSONResponse(answer(), headers=choices.first.memory_headers(), background=afterwards)


async def streamed(choices: Choices, caller: Caller, request: Request, events: AsyncIterator[str]) -> Response:
    """Begin, so that what cannot be answered is refused with its status, and stream the events."""
    if not await _while_there(request, choices.begin):
        await choices.close()  # it may have begun in the same moment
        return Response(status_code=HUNG_UP)
    afterwards = BackgroundTask(_afterwards, request, caller, choices)
    return TurnStream(choices, events, afterwards, choices.first.memory_headers())


class TurnStream(StreamingResponse):
    """Turns as server-sent events, closed with them: that the client hung up reaches the engine at once."""

    def __init__(
        self,
        turns: Choices,
        events: AsyncIterator[str],
        background: BackgroundTask,
        told: Mapping[str, str] | None = None,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(told or {})}
        super().__init__(events, media_type="text/event-stream", headers=headers, background=background)
        self.turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.turns.close()  # of a client who hung up before the first event, nothing was iterated

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


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


async def _afterwards(request: Request, caller: Caller, choices: Choices) -> None:
    """Do what the client need not wait for."""
    state = request.app.state
    for turn in choices.turns:
        if turn.has_begun:
            recording = turn.recording
            num_read, num_written = turn.num_tokens
            if turn is not choices.first:  # the prompt, which all choices share, counts once
                num_read -= recording.num_prompt_tokens
            num_extra = (step_of(recording.steps) or {}).get("extra_tokens", 0)
            state.gate.limits.count_tokens(caller, num_read + num_written + num_extra)
            await state.self_evaluator.offer(recording)


def sse(data: dict[str, Any], event: str | None = None) -> str:
    """Return a server-sent event."""
    named_event = f"event: {event}\n" if event else ""
    return f"{named_event}data: {json.dumps(data, ensure_ascii=False)}\n\n"
