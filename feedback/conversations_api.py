"""``/v1/conversations``: what a person keeps. For those with a name: what nobody in particular said is nobody's."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from feedback import conversations
from feedback.api import Before, Limit
from feedback.identity import NamedUser
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

router = APIRouter(prefix="/v1/conversations", tags=["conversations"], dependencies=[needs(Role.USER)])

Title = Annotated[CleanText, Field(min_length=1, max_length=200, pattern=r"\S"), AfterValidator(str.strip)]
Cursor = Annotated[
    str | None,
    Query(pattern=r"^[0-9]{1,16}-cv_[0-9a-f]{32}$", description="`next_before` of the page before."),
]
Words = Annotated[CleanText, Query(max_length=200, description="Words of the title, of a question or an answer.")]


class NewConversation(BaseModel):
    """A conversation to be kept."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"title": "Rome in May"}]})

    title: Title | None = Field(None, description="Without one it is called by its first question.")


class NewTitle(BaseModel):
    """What a conversation is to be called."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"title": "Rome in May"}]})

    title: Title | None = Field(description="null has it called by its first question again.")


class ConversationView(BaseModel):
    """A conversation."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    title: str | None = Field(description="As it was named, or the beginning of its first question; else null.")
    created_at: datetime
    updated_at: datetime = Field(description="When its last turn ended.")


class ConversationPage(BaseModel):
    """Conversations, the most recently used first; ``next_before`` is null on the last page."""

    data: list[ConversationView]
    next_before: str | None


class TurnView(BaseModel):
    """A question with its answer, and what you say of it now."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="The episode: feedback refers to it.")
    parent_id: str | None = Field(description="The episode that it follows; null for a first turn.")
    question: str
    answer: str
    status: Literal["complete", "interrupted", "failed"]
    finish_reason: str | None
    release: str
    created_at: datetime
    thumb: int = Field(description="1, -1, or 0 for none.")
    reasons: list[str]
    comment: str | None
    correction: str | None


class TurnPage(BaseModel):
    """Turns, the newest first; ``next_before`` is null on the last page."""

    data: list[TurnView]
    next_before: str | None


class Deleted(BaseModel):
    """What went with a conversation."""

    id: str
    deleted: Literal[True] = True
    num_turns: int
    num_signals_withdrawn: int = Field(description="Signals that stood, and teach no more.")


@router.post("", status_code=201)
def create(body: NewConversation, user: NamedUser, request: Request) -> ConversationView:
    """Begin a conversation; name it in chat completions, and their turns are kept in it."""
    with transaction(request.app.state.sessions) as session:
        return ConversationView.model_validate(conversations.create(session, user, body.title))


@router.get("")
def list_conversations(
    user: NamedUser, request: Request, before: Cursor = None, limit: Limit = 20, query: Words = ""
) -> ConversationPage:
    """List your conversations, the most recently used first; with `query`, those that have all its words."""
    with transaction(request.app.state.sessions) as session:
        found = conversations.page(session, user, before, limit, query)
    views = [ConversationView.model_validate(each) for each in found]
    return ConversationPage(data=views, next_before=found[-1].cursor if len(found) == limit else None)


@router.get("/{conversation_id}")
def get(conversation_id: CleanText, user: NamedUser, request: Request) -> ConversationView:
    """Return a conversation of yours."""
    with transaction(request.app.state.sessions) as session:
        return ConversationView.model_validate(conversations.get(session, conversation_id, user))


@router.post("/{conversation_id}")
def rename(conversation_id: CleanText, body: NewTitle, user: NamedUser, request: Request) -> ConversationView:
    """Rename a conversation of yours."""
    with transaction(request.app.state.sessions) as session:
        return ConversationView.model_validate(conversations.rename(session, conversation_id, user, body.title))


@router.delete("/{conversation_id}")
def delete(conversation_id: CleanText, user: NamedUser, request: Request) -> Deleted:
    """Delete a conversation of yours, and have nothing more learned from it.

    Its signals are withdrawn, its words blanked. What earlier nights learned stays until you ask to be forgotten.
    """
    with transaction(request.app.state.sessions) as session:
        gone = conversations.delete(session, conversation_id, user)
    return Deleted(id=conversation_id, num_turns=gone.num_turns, num_signals_withdrawn=gone.num_signals)


@router.get("/{conversation_id}/turns")
def list_turns(
    conversation_id: CleanText, user: NamedUser, request: Request, before: Before = None, limit: Limit = 30
) -> TurnPage:
    """List the turns of a conversation of yours, the newest first; versions of a turn have the same `parent_id`."""
    with transaction(request.app.state.sessions) as session:
        found = conversations.turns(session, conversation_id, user, before, limit)
    views = [TurnView.model_validate(each) for each in found]
    return TurnPage(data=views, next_before=found[-1].id if len(found) == limit else None)
