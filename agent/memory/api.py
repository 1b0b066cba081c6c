"""``/v1/memories``, and pins: what is remembered of a person, for them to see, correct and delete."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agent.memory import facts, store
from feedback import conversations, episodes, users
from feedback.identity import NamedUser
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

PAGE = Path(__file__).parent.parent / "static" / "memory.html"

router = APIRouter(tags=["memory"], dependencies=[needs(Role.USER)])

Text = Annotated[
    CleanText, Field(min_length=1, max_length=facts.MAX_CHARS, pattern=r"\S"), AfterValidator(str.strip)
]


class NewMemory(BaseModel):
    """Something to be remembered."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"text": "I am allergic to walnuts."}]}
    )

    text: Text


class MemoryView(BaseModel):
    """Something that is remembered, in the person's own words, and where they said it."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    text: str
    episode_id: str | None = Field(description="The turn in which it was said; null where it was written down.")
    conversation_id: str | None
    created_at: datetime
    updated_at: datetime


class MemoryList(BaseModel):
    """All that is remembered of a person, the newest first."""

    data: list[MemoryView]
    remember: bool = Field(description="Whether what they say is remembered across conversations.")


class Choice(BaseModel):
    """Whether somebody wants to be remembered."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"remember": False}]})

    remember: bool


class MemoryDeleted(BaseModel):
    """What was deleted."""

    id: str
    deleted: Literal[True] = True


class Pin(BaseModel):
    """Whether a turn is part of every context of its conversation."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"pinned": True}]})

    pinned: bool


class Pins(BaseModel):
    """The pinned turns of a conversation."""

    data: list[str]


@router.get("/memory", include_in_schema=False)
def memory_page() -> FileResponse:
    """Serve the page on which people see, correct and delete what is remembered of them."""
    return FileResponse(PAGE)


@router.get("/v1/memories")
def list_memories(user: NamedUser, request: Request) -> MemoryList:
    """List what is remembered of you, the newest first."""
    by_default = request.app.state.settings.memory
    with transaction(request.app.state.sessions) as session:
        data = [MemoryView.model_validate(memory) for memory in facts.of_user(session, user)]
        return MemoryList(data=data, remember=facts.wants(session, user, by_default=by_default))


@router.post("/v1/memories", status_code=201)
def add_memory(body: NewMemory, user: NamedUser, request: Request) -> MemoryView:
    """Have something remembered; where it is of a kind of which there is one, such as a name, it replaces it."""
    with transaction(request.app.state.sessions) as session:
        users.meet(session, user)
        return MemoryView.model_validate(facts.add(session, user, body.text))


@router.put("/v1/memories/choice")
def choose(body: Choice, user: NamedUser, request: Request) -> Choice:
    """Say whether you want to be remembered; without, nothing new is kept, and nothing that is kept is used."""
    with transaction(request.app.state.sessions) as session:
        users.meet(session, user)
        facts.choose(session, user, remember=body.remember)
    return body


@router.patch("/v1/memories/{memory_id}")
def change_memory(memory_id: CleanText, body: NewMemory, user: NamedUser, request: Request) -> MemoryView:
    """Correct what is remembered."""
    with transaction(request.app.state.sessions) as session:
        return MemoryView.model_validate(facts.change(session, user, memory_id, body.text))


@router.delete("/v1/memories/{memory_id}")
def delete_memory(memory_id: CleanText, user: NamedUser, request: Request) -> MemoryDeleted:
    """Have something forgotten; contexts of before keep it, as the answers to them do."""
    with transaction(request.app.state.sessions) as session:
        facts.delete(session, user, memory_id)
    return MemoryDeleted(id=memory_id)


@router.get("/v1/conversations/{conversation_id}/pins")
def pins(conversation_id: CleanText, user: NamedUser, request: Request) -> Pins:
    """List the turns of a conversation of yours that are pinned."""
    with transaction(request.app.state.sessions) as session:
        conversations.get(session, conversation_id, user)
        return Pins(data=store.pinned(session, conversation_id))


@router.post("/v1/conversations/{conversation_id}/turns/{episode_id}/pin")
def pin(conversation_id: CleanText, episode_id: CleanText, body: Pin, user: NamedUser, request: Request) -> Pin:
    """Pin a turn of yours: what follows it always has it in mind, cut where it is longer than what fits."""
    with transaction(request.app.state.sessions) as session:
        conversations.get(session, conversation_id, user)
        if not store.pin(session, conversation_id, episode_id, pinned=body.pinned):
            raise episodes.not_found(episode_id)
    return body
