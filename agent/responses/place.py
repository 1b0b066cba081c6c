"""Where a response stands: what was said before it, in a conversation or after another response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from feedback import conversations, episodes, items
from feedback.tables import Episode
from infra.errors import EverloopError, InvalidRequestError, NotFoundError


@dataclass(frozen=True, slots=True)
class Place:
    """The conversation that a response is in, if in one, and the episode that it follows, if any."""

    conversation: str | None = None
    parent: str | None = None


def find(
    session: Session, user_id: str, conversation: str | None, previous: str | None
) -> tuple[Place, list[dict[str, Any]]]:
    """Return where a response of a user's is to stand, and the messages before it.

    What follows a turn of a conversation is in that conversation, too.

    Raises
    ------
    InvalidRequestError
        Code ``two_places`` where both are named.
    NotFoundError
        Codes ``conversation_not_found`` and ``previous_response_not_found``.
    """
    if conversation is not None and previous is not None:
        raise InvalidRequestError(
            "Name a `conversation` or a `previous_response_id`, not both.",
            code="two_places",
            param="previous_response_id",
        )
    if conversation is not None:
        try:
            conversations.own(session, conversation, user_id)
        except NotFoundError as error:
            raise conversations.not_found(conversation, param="conversation") from error
        previous = items.latest_turn(session, conversation)
    elif previous is not None:
        row = readable(session, previous, user_id, "previous_response_id", "previous_response_not_found")
        conversation = row.conversation_id
    said = items.thread(session, user_id, previous) if previous is not None else []
    put = items.put_in(session, conversation) if conversation is not None else []
    return Place(conversation, previous), items.messages(items.in_order(said, put))


def readable(
    session: Session, response_id: str, user_id: str, param: str = "response_id", code: str = "response_not_found"
) -> Episode:
    """Return a response of a user's that is there: stored, and not deleted.

    Raises
    ------
    NotFoundError
    """
    missing = NotFoundError(
        f"There is no answer {response_id!r} of yours: use the `id` of one that was stored.", code=code, param=param
    )
    try:
        row = episodes.get(session, response_id, user_id)
    except EverloopError as error:
        raise missing from error
    if not row.messages or (row.request or {}).get("unstored"):
        raise missing
    return row
