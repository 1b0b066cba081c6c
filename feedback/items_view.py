"""Messages as OpenAI's API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import Path, Query
from pydantic import BaseModel, Field

from feedback.items import Item

ITEM_ID = r"^msg_[0-9a-f]{32}(_[0-9]{3}|_out(_[0-9]{2,3}|c[0-9]{3})?)?$"
ItemId = Annotated[str, Path(pattern=ITEM_ID)]
AfterItem = Annotated[str | None, Query(pattern=ITEM_ID, description="`last_id` of the page before.")]
Order = Literal["asc", "desc"]


class ItemView(BaseModel):
    """A message, a call of the client's, or what it returned."""

    id: str
    status: Literal["completed", "incomplete"]


class MessageView(ItemView):
    """A message."""

    type: Literal["message"] = "message"
    role: str
    content: list[dict[str, Any]]


class CallView(ItemView):
    """A call that the client was to make."""

    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class CallOutputView(ItemView):
    """What a call of the client's returned."""

    type: Literal["function_call_output"] = "function_call_output"
    call_id: str
    output: str


AnyItemView = Annotated[MessageView | CallView | CallOutputView, Field(discriminator="type")]


def shown(item: Item) -> MessageView | CallView | CallOutputView:
    """Return an item as it is shown."""
    status: Literal["completed", "incomplete"] = "completed" if item.is_complete else "incomplete"
    if item.call is not None:
        name, arguments = item.call["name"], item.call["arguments"]
        return CallView(id=item.id, status=status, call_id=item.call["id"], name=name, arguments=arguments)
    if item.call_id is not None:
        return CallOutputView(id=item.id, status=status, call_id=item.call_id, output=item.content)
    part: dict[str, Any] = {"type": "input_text", "text": item.content}
    if item.role == "assistant":
        part = {"type": "output_text", "text": item.content, "annotations": []}
    return MessageView(id=item.id, role=item.role, status=status, content=[part])


class ItemPage(BaseModel):
    """Messages in the order that was asked for; the next page begins after ``last_id``."""

    object: Literal["list"] = "list"
    data: list[AnyItemView]
    first_id: str | None = Field(description="null where there are none.")
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[Item], has_more: bool) -> Self:
        """Return a page of items."""
        first, last = (items[0].id, items[-1].id) if items else (None, None)
        return cls(data=[shown(item) for item in items], first_id=first, last_id=last, has_more=has_more)
