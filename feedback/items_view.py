"""Messages as OpenAI's API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import Path, Query
from pydantic import BaseModel, Field

from feedback.items import Item

ITEM_ID = r"^msg_[0-9a-f]{32}(_[0-9]{3}|_out)?$"
ItemId = Annotated[str, Path(pattern=ITEM_ID)]
AfterItem = Annotated[str | None, Query(pattern=ITEM_ID, description="`last_id` of the page before.")]
Order = Literal["asc", "desc"]


class ItemView(BaseModel):
    """A message."""

    id: str
    type: Literal["message"] = "message"
    role: str
    status: Literal["completed", "incomplete"]
    content: list[dict[str, Any]]

    @classmethod
    def of(cls, item: Item) -> Self:
        """Return an item to be shown."""
        part: dict[str, Any] = {"type": "input_text", "text": item.content}
        if item.role == "assistant":
            part = {"type": "output_text", "text": item.content, "annotations": []}
        status: Literal["completed", "incomplete"] = "completed" if item.is_complete else "incomplete"
        return cls(id=item.id, role=item.role, status=status, content=[part])


class ItemPage(BaseModel):
    """Messages in the order that was asked for; the next page begins after ``last_id``."""

    object: Literal["list"] = "list"
    data: list[ItemView]
    first_id: str | None = Field(description="null where there are none.")
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[Item], has_more: bool) -> Self:
        """Return a page of items."""
        first, last = (items[0].id, items[-1].id) if items else (None, None)
        return cls(data=[ItemView.of(item) for item in items], first_id=first, last_id=last, has_more=has_more)
