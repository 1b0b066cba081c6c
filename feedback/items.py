"""What was said, message by message: the items of conversations, and what led to an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback import conversations, episodes, steps
from feedback.tables import Conversation, ConversationItem, Episode
from infra.errors import ConflictError, NotFoundError
from infra.ids import new_id

MAX_THREAD_TURNS = 512
ANSWER = "out"


@dataclass(frozen=True, slots=True)
class Item:
    """What was said once, with an id that sorts by time: of a turn (its number in the turn, or ``out``), or put in.

    Parameters
    ----------
    role
        ``system``, ``user``, ``assistant``, or ``tool`` for what a call of the client's returned.
    call
        The call that it is (``id``, ``name``, ``arguments`` as text), where the client was to make one.
    call_id
        The call that it is the result of.
    """

    id: str
    role: str
    content: str
    is_complete: bool = True
    call: Mapping[str, str] | None = None
    call_id: str | None = None


def messages(found: Iterable[Item]) -> list[dict[str, Any]]:
    """Return items as messages of a chat; calls stand in the assistant's message that they were made with."""
    said: list[dict[str, Any]] = []
    for item in found:
        if item.call_id is not None:
            said.append({"role": "tool", "tool_call_id": item.call_id, "content": item.content})
            continue
        if item.call is None:
            said.append({"role": item.role, "content": item.content})
            continue
        if not said or said[-1]["role"] != "assistant":
            said.append({"role": "assistant"})
        function = {"name": item.call["name"], "arguments": item.call["arguments"]}
        said[-1].setdefault("tool_calls", []).append(
            {"id": item.call["id"], "type": "function", "function": function}
        )
    return said


def given(
    own: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], *, expected: int
) -> dict[str, Any] | None:
    """Return what an episode keeps of a request whose words are not simply the last ones of the prompt.

    Everloop adds to what was said (what it remembers, what tells of tools) and cuts it. Neither may come back as if
    somebody had said so.

    Parameters
    ----------
    own
        What the request said, as it said it.
    shown
        What the model sees.
    expected
        How many of the last messages of the prompt a reader takes for what was said, unless told otherwise.

    Returns
    -------
    dict | None
        ``num_shown``, the messages at the end of the prompt that are as they were said, and ``first``, those before
        them.
    """
    num_shown = 0
    for ours, theirs in zip(reversed(own), reversed(shown), strict=False):
        if ours != theirs:
            break
        num_shown += 1
    if num_shown == len(own) == expected:
        return None
    return {"num_shown": num_shown, "first": list(own[: len(own) - num_shown])}


def asked(row: Episode, *, whole: bool = False) -> list[Item]:
    """Return what was asked in a turn, without what Everloop added to it.

    Who asks by chat completions sends all of the messages each time: the last is the question. `whole` has them all
    be new in a turn that follows none.
    """
    noted = row.request or {}
    kept = noted.get("given")
    is_first_chat = noted.get("num_input") is None and row.parent_id is None
    if kept is not None:
        own = [*kept["first"], *(row.messages[-kept["num_shown"] :] if kept["num_shown"] else ())]
    else:
        num = len(row.messages) if is_first_chat else int(noted.get("num_input") or 1)
        own = list(row.messages[-num:])
    if is_first_chat and not whole:
        own = own[-1:]
    found = [item for message in own for item in _of_message(message)]
    return [replace(item, id=item_id(row.id, f"{number:03}")) for number, item in enumerate(found)]


def _of_message(message: Mapping[str, Any]) -> Iterator[Item]:
    content = str(message.get("content") or "")
    if message["role"] == "tool":
        yield Item("", "tool", content, call_id=message["tool_call_id"])
        return
    calls = message.get("tool_calls") or ()
    if content or not calls:
        yield Item("", message["role"], content)
    for call in calls:
        yield Item("", "assistant", "", call={"id": call["id"], **call["function"]})


def answered(row: Episode) -> list[Item]:
    """Return what a turn answered: a message, and the calls that the client was to make."""
    found = []
    if row.answer:
        num_steps = len(steps.with_calls(row.steps)) - steps.ended_within(row)
        own_id = item_id(row.id, answer_part(num_steps))
        found.append(Item(own_id, "assistant", row.answer, row.status == "complete"))
    for number, call in enumerate(steps.handed_over(row.steps), 1):
        called = {"id": call["id"], "name": call["tool"], "arguments": steps.written(call["arguments"])}
        found.append(Item(item_id(row.id, f"{ANSWER}c{number:03}"), "assistant", "", call=called))
    return found


def answer_part(num_steps: int) -> str:
    """Return which part of a turn a message is that was said after so many steps; at last it is the answer."""
    return f"{ANSWER}_{num_steps:02}" if num_steps else ANSWER


def item_id(episode_id: str, part: str) -> str:
    """Return the id of an item of a turn."""
    return f"msg_{episode_id.partition('_')[2]}_{part}"


def thread(session: Session, user_id: str, episode_id: str) -> list[Item]:
    """Return what was said up to and with an answer of a user's, each turn as it was logged, the oldest first.

    At most 512 turns are gone back, and none beyond one that was deleted.
    """
    start = (
        sa.select(Episode.id, Episode.parent_id, sa.literal(1).label("depth"))
        .where(Episode.id == episode_id, Episode.user_id == user_id)
        .cte("thread", recursive=True)
    )
    before = sa.select(Episode.id, Episode.parent_id, start.c.depth + 1).where(
        Episode.id == start.c.parent_id, Episode.user_id == user_id, start.c.depth < MAX_THREAD_TURNS
    )
    ids = session.scalars(sa.select(start.union_all(before).c.id)).all()
    rows = session.scalars(sa.select(Episode).where(Episode.id.in_(ids)).order_by(Episode.id))
    return [item for row in rows for item in _items(row, whole=True)]


def _items(row: Episode, *, whole: bool = False) -> list[Item]:
    return [*asked(row, whole=whole), *answered(row)] if row.messages else []


def latest_turn(session: Session, conversation_id: str) -> str | None:
    """Return the id of the newest turn of a conversation; None where it has none."""
    return session.scalar(
        sa.select(Episode.id).where(Episode.conversation_id == conversation_id).order_by(Episode.id.desc()).limit(1)
    )


def in_order(*several: Iterable[Item]) -> list[Item]:
    """Return items, the oldest first."""
    return sorted((item for items in several for item in items), key=lambda item: item.id)


def put_in(session: Session, conversation_id: str, after: str | None = None) -> list[Item]:
    """Return the messages that somebody put into a conversation."""
    query = sa.select(ConversationItem).where(ConversationItem.conversation_id == conversation_id)
    if after is not None:
        query = query.where(ConversationItem.id > after)
    return [Item(row.id, row.role, row.content) for row in session.scalars(query.order_by(ConversationItem.id))]


def add(session: Session, conversation_id: str, user_id: str, said: Sequence[tuple[str, str]]) -> list[Item]:
    """Put messages into a conversation, each a role and a text.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    conversations.own(session, conversation_id, user_id)
    items = [Item(new_id("msg"), role, content) for role, content in said]
    # Ids of one millisecond are in no order: these must be.
    ids = sorted(item.id for item in items)
    items = [Item(each, item.role, item.content) for each, item in zip(ids, items, strict=True)]
    for item in items:
        session.add(
            ConversationItem(id=item.id, conversation_id=conversation_id, role=item.role, content=item.content)
        )
    session.execute(
        sa.update(Conversation).where(Conversation.id == conversation_id).values(updated_at=sa.func.now())
    )
    session.flush()
    return items


def page(
    session: Session,
    conversation_id: str,
    user_id: str,
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"],
) -> tuple[list[Item], bool]:
    """Return items of a conversation, and whether there are more.

    Parameters
    ----------
    after
        The id of the last item of the page before.

    Raises
    ------
    NotFoundError
        Code ``conversation_not_found``.
    """
    conversations.own(session, conversation_id, user_id)
    descending = order == "desc"
    # Each turn has an item at least, so that many turns are enough: the one that `after` is of, and so many more.
    turns = sa.select(Episode).where(Episode.conversation_id == conversation_id, episodes.is_shown())
    own = sa.select(ConversationItem).where(ConversationItem.conversation_id == conversation_id)
    if after is not None:
        turn_id = f"ep_{after.split('_')[1]}"
        turns = turns.where(Episode.id <= turn_id if descending else Episode.id >= turn_id)
        own = own.where(ConversationItem.id < after if descending else ConversationItem.id > after)
    turns = turns.order_by(Episode.id.desc() if descending else Episode.id).limit(limit + 2)
    own = own.order_by(ConversationItem.id.desc() if descending else ConversationItem.id).limit(limit + 1)
    put = [Item(row.id, row.role, row.content) for row in session.scalars(own)]
    found = in_order((item for row in session.scalars(turns) for item in _items(row)), put)
    if descending:
        found.reverse()
    if after is not None:
        found = [item for item in found if (item.id < after if descending else item.id > after)]
    return found[:limit], len(found) > limit


def get(session: Session, conversation_id: str, user_id: str, wanted: str) -> Item:
    """Return an item of a conversation.

    Raises
    ------
    NotFoundError
        Codes ``conversation_not_found`` and ``item_not_found``.
    """
    conversations.own(session, conversation_id, user_id)
    row = session.get(ConversationItem, wanted)
    if row is not None and row.conversation_id == conversation_id:
        return Item(row.id, row.role, row.content)
    turn = session.get(Episode, f"ep_{wanted.split('_')[1]}" if wanted.count("_") >= 2 else "")
    if turn is not None and turn.conversation_id == conversation_id:
        for item in _items(turn):
            if item.id == wanted:
                return item
    raise NotFoundError(f"There is no item {wanted!r} here.", code="item_not_found", param="item_id")


def remove(session: Session, conversation_id: str, user_id: str, wanted: str) -> None:
    """Take out a message that was put in.

    Raises
    ------
    NotFoundError
        As :func:`get`.
    ConflictError
        Code ``item_of_a_turn`` for a question or an answer: they go together.
    """
    get(session, conversation_id, user_id, wanted)
    row = session.get(ConversationItem, wanted)
    if row is None:
        turn_id = f"ep_{wanted.split('_')[1]}"
        raise ConflictError(
            f"A question and its answer go together: DELETE /v1/responses/{turn_id} takes both.",
            code="item_of_a_turn",
            param="item_id",
        )
    session.delete(row)
