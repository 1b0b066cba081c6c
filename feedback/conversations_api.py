"""``/v1/conversations``: what a person keeps. For those with a name: what nobody in particular said is nobody's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from feedback import conversations, items
from feedback.api import Before, Limit
from feedback.identity import NamedUser
from feedback.items_view import AfterItem, AnyItemView, ItemId, ItemPage, Order, shown
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.parameters import Content, Metadata, Only, OpenAIRequest, Speaker
from infra.text import CleanText

MAX_NEW_ITEMS = 20  # as OpenAI's

router = APIRouter(prefix="/v1/conversations", tags=["conversations"], dependencies=[needs(Role.USER)])

Title = Annotated[CleanText, Field(min_length=1, max_length=200, pattern=r"\S"), AfterValidator(str.strip)]
Cursor = Annotated[
    str | None,
    Query(pattern=r"^[0-9]{1,16}-cv_[0-9a-f]{32}$", description="`next_before` of the page before."),
]
Words = Annotated[CleanText, Query(max_length=200, description="Words of the title, of a question or an answer.")]


class NewItem(OpenAIRequest):
    """A message that is put into a conversation; nobody answers it."""

    only: ClassVar[Mapping[str, Only]] = {
        "type": Only(("message",), "Only messages are kept; leave it out."),
        "status": Only(("completed", "incomplete"), "completed or incomplete; it is not kept."),
    }

    role: Speaker
    content: Content
    id: str | None = Field(None, description="Not kept: the item gets an id of its own.")
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="Not kept.")


Items = Annotated[list[NewItem], Field(min_length=1, max_length=MAX_NEW_ITEMS)]


class NewConversation(OpenAIRequest):
    """A conversation to be kept."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "Rome in May"}]})
    own: ClassVar[frozenset[str]] = frozenset({"title"})

    title: Title | None = Field(None, description="Without one it is called by its first question.")
    metadata: Metadata | None = None
    items: Annotated[list[NewItem], Field(max_length=MAX_NEW_ITEMS)] | None = Field(
        None, description="What was said before."
    )


class Change(BaseModel):
    """What a conversation is to be called, or its metadata; what is not named stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"title": "Rome in May"}]})

    title: Title | None = Field(None, description="null has it called by its first question again.")
    metadata: Metadata | None = Field(None, description="null takes it away.")

    @model_validator(mode="after")
    def _something_changes(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("Name a `title` or `metadata`.")
        return self


def _unix_s(at: datetime) -> int:
    return int(at.timestamp())


class ConversationView(BaseModel):
    """A conversation."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    title: str | None = Field(description="As it was named, or the beginning of its first question; else null.")
    object: Literal["conversation"] = "conversation"
    created_at: Annotated[int, BeforeValidator(_unix_s)] = Field(description="Seconds since 1970.")
    updated_at: datetime = Field(description="When its last turn ended.")
    metadata: dict[str, str]


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
    used: dict[str, int] | None = Field(
        description="How many of the `earlier` messages were `kept` in the context, and how many `memories` of you."
    )
    thumb: int = Field(description="1, -1, or 0 for none.")
    reasons: list[str]
    comment: str | None
    correction: str | None
    steps: list[dict[str, Any]] = Field(description="Calls of tools before the answer, with what came of them.")


class TurnPage(BaseModel):
    """Turns, the newest first; ``next_before`` is null on the last page."""

    data: list[TurnView]
    next_before: str | None


class Deleted(BaseModel):
    """What went with a conversation."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True
    num_turns: int
    num_signals_withdrawn: int = Field(description="Signals that stood, and teach no more.")


class NewItems(OpenAIRequest):
    """Messages to be put into a conversation."""

    items: Items


@router.post("", status_code=201)
def create(body: NewConversation, user: NamedUser, request: Request) -> ConversationView:
    """Begin a conversation; name it in chat completions, and their turns are kept in it."""
    with transaction(request.app.state.sessions) as session:
        begun = conversations.create(session, user, body.title, body.metadata)
        if body.items:
            items.add(session, begun.id, user, [(item.role, item.content) for item in body.items])
        return ConversationView.model_validate(begun)


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
def change(conversation_id: CleanText, body: Change, user: NamedUser, request: Request) -> ConversationView:
    """Rename a conversation of yours, or change its metadata."""
    with transaction(request.app.state.sessions) as session:
        changed = conversations.get(session, conversation_id, user)
        if "title" in body.model_fields_set:
            changed = conversations.rename(session, conversation_id, user, body.title)
        if "metadata" in body.model_fields_set:
            changed = conversations.describe(session, conversation_id, user, body.metadata or {})
        return ConversationView.model_validate(changed)


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


@router.get("/{conversation_id}/items")
def list_items(
    conversation_id: CleanText,
    user: NamedUser,
    request: Request,
    after: AfterItem = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> ItemPage:
    """List the messages of a conversation of yours, those of its turns and those that were put in."""
    with transaction(request.app.state.sessions) as session:
        found, has_more = items.page(session, conversation_id, user, after, limit, order)
    return ItemPage.of(found, has_more)


@router.post("/{conversation_id}/items")
def add_items(conversation_id: CleanText, body: NewItems, user: NamedUser, request: Request) -> ItemPage:
    """Put messages into a conversation of yours; the next response in it is shown them."""
    with transaction(request.app.state.sessions) as session:
        put = items.add(session, conversation_id, user, [(item.role, item.content) for item in body.items])
    return ItemPage.of(put, False)


@router.get("/{conversation_id}/items/{item_id}")
def get_item(conversation_id: CleanText, item_id: ItemId, user: NamedUser, request: Request) -> AnyItemView:
    """Return a message of a conversation of yours."""
    with transaction(request.app.state.sessions) as session:
        return shown(items.get(session, conversation_id, user, item_id))


@router.delete("/{conversation_id}/items/{item_id}")
def delete_item(conversation_id: CleanText, item_id: ItemId, user: NamedUser, request: Request) -> ConversationView:
    """Take a message out that was put in; a question and its answer go together, with `DELETE /v1/responses/…`."""
    with transaction(request.app.state.sessions) as session:
        items.remove(session, conversation_id, user, item_id)
        return ConversationView.model_validate(conversations.get(session, conversation_id, user))
