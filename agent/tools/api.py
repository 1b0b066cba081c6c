"""``/v1/tools``, ``/v1/tool_calls``, and going on after a yes or a no."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from agent.answers import completion
from agent.api import chat_events
from agent.exchange import choices_for, streamed, whole
from agent.schema import ClientTool, StreamOptions
from agent.tools import going_on
from agent.tools.levels import LEVELS
from agent.tools.tool import Tool
from feedback import tool_calls
from feedback.identity import NamedUser
from feedback.tool_calls import Status
from infra.access.gate import SignedIn, needs
from infra.access.roles import Role
from infra.db import transaction
from infra.errors import InvalidRequestError, NotFoundError
from infra.settings import ToolLevel
from infra.text import CleanText

router = APIRouter(prefix="/v1", tags=["tools"], dependencies=[needs(Role.USER)])


class ToolView(BaseModel):
    """A tool, and how far it may go for you."""

    name: str
    description: str
    source: str = Field(description="`built in`, or the MCP server that brings it.")
    parameters: dict[str, Any] = Field(description="JSON Schema of its arguments.")
    ceiling: ToolLevel = Field(description="The most that the operator lets it do.")
    chosen: ToolLevel | None = Field(description="What you chose; null for nothing.")
    level: ToolLevel = Field(description="What it may do where a request names no tools.")


class ToolList(BaseModel):
    """All tools. What is wrong with MCP servers is for operators."""

    data: list[ToolView]
    problems: list[str]


class ToolLevelBody(BaseModel):
    """How far you let a tool go."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"level": "ask"}]})

    level: ToolLevel | None = Field(description="`off`, `ask`, `auto`; null for what holds for who chose nothing.")


class ToolCallView(BaseModel):
    """A call that waits, or waited, for your yes."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    episode_id: str = Field(description="The answer that stopped for it.")
    tool: str
    source: str
    arguments: Any = Field(description="What the model wrote; treat it as you would a stranger's words.")
    status: Status
    created_at: datetime
    expires_at: datetime
    continued_by: str | None = Field(description="The answer that went on from there.")


class ToolCallList(BaseModel):
    """Calls, the newest first."""

    data: list[ToolCallView]


class Decision(BaseModel):
    """Whether a call may be made."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"decision": "approve"}]})

    decision: Literal["approve", "deny"]


class ContinueRequest(BaseModel):
    """How an answer goes on."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"stream": True}]})

    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[ClientTool] | None = Field(
        None, min_length=1, max_length=128, description="The client's own tools, if it had sent any."
    )


@router.get("/tools")
def list_tools(user: NamedUser, caller: SignedIn, request: Request) -> ToolList:
    """List the tools that there are, and how far each may go for you."""
    toolbox = request.app.state.toolbox
    with transaction(request.app.state.sessions) as session:
        chosen = tool_calls.choices(session, [user]).get(user, {})
    views = [_tool_view(request, tool, user, chosen) for tool in toolbox.tools.values()]
    return ToolList(data=views, problems=toolbox.problems if caller.role.reaches(Role.OPERATOR) else [])


def _tool_view(request: Request, tool: Tool, user: str, chosen: Mapping[str, ToolLevel]) -> ToolView:
    toolbox = request.app.state.toolbox
    return ToolView(
        **tool.function(),
        source=tool.source,
        ceiling=toolbox.ceiling(tool),
        chosen=chosen.get(tool.name),
        level=toolbox.level(tool, user, chosen.get(tool.name), wanted=False),
    )


@router.put("/tools/{name}")
def set_level(name: CleanText, body: ToolLevelBody, user: NamedUser, request: Request) -> ToolView:
    """Say how far a tool may go for you: at most as far as the operator lets it."""
    toolbox = request.app.state.toolbox
    tool = toolbox.tools.get(name)
    if tool is None:
        raise NotFoundError(
            f"There is no tool {name!r} here. GET /v1/tools lists those that there are.",
            code="unknown_tool",
            param="name",
        )
    highest = toolbox.ceiling(tool)
    if body.level is not None and LEVELS.index(body.level) > LEVELS.index(highest):
        raise InvalidRequestError(
            f"{name!r} may go as far as {highest!r} here, and {body.level!r} is more.",
            code="level_above_ceiling",
            param="level",
        )
    with transaction(request.app.state.sessions) as session:
        tool_calls.choose(session, user, name, body.level)
        chosen = tool_calls.choices(session, [user]).get(user, {})
    return _tool_view(request, tool, user, chosen)


@router.get("/tool_calls")
def list_tool_calls(
    user: NamedUser,
    request: Request,
    status: Annotated[Status | None, Query(description="Those alone.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> ToolCallList:
    """List calls that wait, or waited, for your yes."""
    with transaction(request.app.state.sessions) as session:
        found = tool_calls.page(session, user, status, limit)
    return ToolCallList(data=[ToolCallView.model_validate(one) for one in found])


@router.post("/tool_calls/{tool_call_id}")
def decide(tool_call_id: CleanText, body: Decision, user: NamedUser, request: Request) -> ToolCallView:
    """Allow a call, or do not. Nothing is called yet: the answer goes on when it is told to."""
    with transaction(request.app.state.sessions) as session:
        found = tool_calls.decide(session, tool_call_id, user, approve=body.decision == "approve")
    return ToolCallView.model_validate(found)


@router.post("/chat/completions/{episode_id}/continue", response_model=None)
async def go_on(
    episode_id: CleanText, body: ContinueRequest, user: NamedUser, caller: SignedIn, request: Request
) -> Response:
    """Go on with an answer that stopped for your yes, once each of its calls is decided; or that broke off.

    The calls that you allowed are made, the others are not, and the model is told. Where the answer broke off after
    its calls had ended, they are not made again. What comes is an answer as that of ``/v1/chat/completions``, with
    an ``id`` of its own; both are one turn.
    """
    state = request.app.state
    stopped = await anyio.to_thread.run_sync(going_on.find, state.sessions, episode_id, user)
    same = going_on.request_of(stopped.episode, state.toolbox.tools, body.model_dump(exclude_unset=True))
    waited = going_on.waited(state.sessions, stopped)
    choices = await choices_for(same, caller, request, None, waited=waited)
    if not body.stream:
        return await whole(choices, caller, request, lambda: completion(choices.turns))
    return await streamed(choices, caller, request, chat_events(choices, body.stream_options or StreamOptions()))
