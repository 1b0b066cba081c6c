"""``/v1/responses``: create, retrieve, delete; what is stored are episodes, those of chats, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel

from agent.answers import shown
from agent.best_of import step_of
from agent.choices import Choices
from agent.exchange import choices_for, streamed, whole
from agent.memory import store
from agent.responses import place, view
from agent.responses.events import events
from agent.responses.schema import FunctionTool, ResponseRequest
from agent.tools import going_on
from agent.turn import Turn
from feedback import episodes, items, tool_calls
from feedback.api import Limit
from feedback.identity import CurrentUser, UserHeader, named
from feedback.items_view import AfterItem, ItemPage, Order
from infra.access.gate import SignedIn, needs
from infra.access.roles import Caller, Role
from infra.db import transaction
from infra.errors import InvalidRequestError
from infra.parameters import UNSUPPORTED
from infra.settings import ASSISTANT_MODEL
from infra.text import CleanText

router = APIRouter(prefix="/v1/responses", tags=["responses"], dependencies=[needs(Role.USER)])


class DeletedResponse(BaseModel):
    """What went with a response."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
    num_signals_withdrawn: int


@router.post("", response_model=None)
async def create(
    body: ResponseRequest, caller: SignedIn, request: Request, x_everloop_user: UserHeader = None
) -> Response:
    """Answer. The response's ``id`` is the episode's, which feedback names; stored, it can be gone on from."""
    user = body.for_whom(caller, named(x_everloop_user))

    def look() -> tuple[place.Place, list[dict[str, Any]]]:
        named_conversation = body.conversation.id if body.conversation else None
        with transaction(request.app.state.sessions) as session:
            return place.find(session, user, named_conversation, body.previous_response_id)

    said = body.approvals
    where, before = await anyio.to_thread.run_sync(look)
    if said:
        choices = await _go_on(body, said, where.parent, user, caller, request)
    else:
        choices = await choices_for(body.as_chat(user, before, where), caller, request, x_everloop_user)
    if body.stream:
        return await streamed(choices, caller, request, events(choices.first))
    return await whole(choices, caller, request, lambda: _answer(choices.first))


async def _go_on(
    body: ResponseRequest, said: Mapping[str, bool], waits: str | None, user: str, caller: Caller, request: Request
) -> Choices:
    """Say yes or no to the calls of a response, and go on with it (:mod:`agent.tools.going_on`)."""
    state = request.app.state

    def decide() -> going_on.Stopped:
        with transaction(state.sessions) as session:
            for call_id, approve in said.items():
                asked = tool_calls.decide(session, call_id, user, approve=approve)
                if waits not in episodes.same_turn(session, asked.episode_id):
                    raise tool_calls.not_found(call_id)
            release = episodes.get(session, asked.episode_id, user).release
            if body.model not in (ASSISTANT_MODEL, release):  # and nothing is decided
                raise InvalidRequestError(
                    f"The answer that waits is {release}'s: name {ASSISTANT_MODEL!r}, and it goes on.",
                    code=UNSUPPORTED,
                    param="model",
                )
        return going_on.find(state.sessions, asked.episode_id, user)

    stopped = await anyio.to_thread.run_sync(decide)
    tools = body.tools or (stopped.episode.request or {}).get("tools") or ()
    named = [tool if isinstance(tool, FunctionTool) else FunctionTool.model_validate(tool) for tool in tools]
    how = {"stream": body.stream, "tools": [tool.as_chat() for tool in named] or None}
    same = going_on.request_of(stopped.episode, state.toolbox.tools, how)
    waited = going_on.waited(state.sessions, stopped)
    return await choices_for(same, caller, request, None, waited=waited)


def _answer(turn: Turn) -> dict[str, Any]:
    recording = turn.recording
    answer = view.response(recording.episode_id, turn.created, recording)
    if chosen := step_of(recording.steps):
        answer["usage"]["best_of"] = shown(chosen)
    if turn.body.logprobs:
        answer["output"] = view.output(recording.episode_id, recording, turn.take_logprobs())
    return answer


@router.get("/{response_id}")
def retrieve(
    response_id: CleanText,
    user: CurrentUser,
    request: Request,
    stream: Annotated[bool, Query(description="Only false: an answer is streamed once.")] = False,
) -> dict[str, Any]:
    """Return a response of yours that is stored; every answer of yours is one, those of chats, too."""
    if stream:
        raise InvalidRequestError(
            "An answer is streamed once, while it is made; leave it out.", code=UNSUPPORTED, param="stream"
        )
    with transaction(request.app.state.sessions) as session:
        row = place.readable(session, response_id, user)
        return view.response(row.id, int(row.created_at.timestamp()), row)


@router.delete("/{response_id}")
def delete(response_id: CleanText, user: CurrentUser, request: Request) -> DeletedResponse:
    """Delete a response of yours with what it answered, withdraw what was said of it, and have it taught no more.

    What later answers were shown of it stays in them; deleting the conversation takes all.
    """
    with transaction(request.app.state.sessions) as session:
        place.readable(session, response_id, user)
        num_signals = store.delete_turn(session, response_id, user)
    return DeletedResponse(id=response_id, num_signals_withdrawn=num_signals)


@router.post("/{response_id}/cancel")
def cancel(response_id: CleanText, user: CurrentUser, request: Request) -> None:
    """Refuse: only what runs in the background is cancelled, and nothing does. Hanging up ends an answer."""
    with transaction(request.app.state.sessions) as session:
        place.readable(session, response_id, user)
    raise InvalidRequestError(
        "Only responses in the background are cancelled, and none are; to end an answer, close its stream.",
        code="not_in_background",
        param="response_id",
    )


@router.get("/{response_id}/input_items")
def list_input_items(
    response_id: CleanText,
    user: CurrentUser,
    request: Request,
    after: AfterItem = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> ItemPage:
    """List the messages that a response of yours answered, without what came before them."""
    with transaction(request.app.state.sessions) as session:
        row = place.readable(session, response_id, user)
        found = items.asked(row, whole=True)
    if order == "desc":
        found.reverse()
    if after is not None:
        found = [item for item in found if (item.id < after if order == "desc" else item.id > after)]
    return ItemPage.of(found[:limit], len(found) > limit)
