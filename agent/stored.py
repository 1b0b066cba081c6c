"""Chat completions that are kept: listed, returned, described and deleted. They are episodes, as responses are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from agent.memory import store
from agent.responses.place import readable
from feedback import episodes, users
from feedback.api import Limit
from feedback.identity import CurrentUser, NamedUser
from feedback.items_view import Order
from feedback.tables import Episode
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.parameters import Metadata, OpenAIRequest
from infra.text import CleanText

router = APIRouter(prefix="/v1/chat/completions", tags=["assistant"], dependencies=[needs(Role.USER)])
METADATA = "metadata["  # how the official client writes a filter: metadata[key]=value
After = Annotated[CleanText | None, Query(max_length=64, description="`last_id` of the page before.")]


class Described(OpenAIRequest):
    """Other metadata for a chat completion."""

    metadata: Metadata


class DeletedCompletion(BaseModel):
    """What went with a chat completion."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True
    num_signals_withdrawn: int


@router.get("")
def list_completions(
    user: NamedUser,
    request: Request,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    model: Annotated[CleanText | None, Query(max_length=128, description="Only those of this release.")] = None,
) -> dict[str, Any]:
    """List your answers that are stored; with `metadata[key]=value`, those that have it."""
    wanted = {
        name.removeprefix(METADATA).removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith(METADATA)
    }
    query = sa.select(Episode).where(
        Episode.user_id == user,
        Episode.messages != sa.literal([], Episode.messages.type),
        sa.func.coalesce(Episode.request["unstored"].as_boolean(), sa.false()).is_(False),
    )
    if wanted:
        query = query.where(Episode.request["metadata"].contains(wanted))
    if model is not None:
        query = query.where(Episode.release == model)
    if after is not None:
        query = query.where(Episode.id > after if order == "asc" else Episode.id < after)
    query = query.order_by(Episode.id if order == "asc" else Episode.id.desc())
    with transaction(request.app.state.sessions) as session:
        rows = session.scalars(query.limit(limit + 1)).all()
        return _page([completion_of(row) for row in rows[:limit]], len(rows) > limit)


@router.get("/{completion_id}")
def retrieve(completion_id: CleanText, user: CurrentUser, request: Request) -> dict[str, Any]:
    """Return an answer of yours that is stored."""
    with transaction(request.app.state.sessions) as session:
        return completion_of(_stored(session, completion_id, user))


@router.get("/{completion_id}/messages")
def list_messages(
    completion_id: CleanText,
    user: CurrentUser,
    request: Request,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> dict[str, Any]:
    """List the messages that the model was shown for an answer of yours."""
    with transaction(request.app.state.sessions) as session:
        row = _stored(session, completion_id, user)
        found = [
            {"id": f"{row.id}-{number:03}", **message, "content_parts": None}
            for number, message in enumerate(row.messages)
        ]
    if order == "desc":
        found.reverse()
    if after is not None:
        found = [each for each in found if (each["id"] > after if order == "asc" else each["id"] < after)]
    return _page(found[:limit], len(found) > limit)


@router.post("/{completion_id}")
def describe(completion_id: CleanText, body: Described, user: CurrentUser, request: Request) -> dict[str, Any]:
    """Give an answer of yours other metadata."""
    with transaction(request.app.state.sessions) as session:
        users.key_of(session, user)  # so that nothing is written of somebody who is being forgotten
        row = _stored(session, completion_id, user)
        session.refresh(row, with_for_update=True)
        if not row.messages:
            raise episodes.not_found(completion_id, "completion_id")
        row.request = {**(row.request or {}), "metadata": body.metadata}
        session.flush()
        return completion_of(row)


@router.delete("/{completion_id}")
def delete(completion_id: CleanText, user: CurrentUser, request: Request) -> DeletedCompletion:
    """Delete an answer of yours with its question, withdraw what was said of it, and have it taught no more."""
    with transaction(request.app.state.sessions) as session:
        _stored(session, completion_id, user)
        num_signals = store.delete_turn(session, completion_id, user)
    return DeletedCompletion(id=completion_id, num_signals_withdrawn=num_signals)


def _stored(session: Any, completion_id: str, user: str) -> Episode:
    return readable(session, completion_id, user, "completion_id", "completion_not_found")


def completion_of(row: Episode) -> dict[str, Any]:
    """Return a kept answer as a ``chat.completion``."""
    num_answer = len(row.token_ids)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": row.answer, "refusal": None},
        "logprobs": None,
        "finish_reason": row.finish_reason,
        "episode_id": row.id,
    }
    return {
        "id": row.id,
        "object": "chat.completion",
        "created": int(row.created_at.timestamp()),
        "model": row.release,
        "choices": [choice],
        "metadata": (row.request or {}).get("metadata") or {},
        "usage": {
            "prompt_tokens": row.num_prompt_tokens,
            "completion_tokens": num_answer,
            "total_tokens": row.num_prompt_tokens + num_answer,
        },
    }


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
