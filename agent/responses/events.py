"""A response as the events of its stream, in the order in which OpenAI's API sends them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any

from agent.exchange import sse
from agent.responses import view
from agent.turn import Turn
from feedback.steps import UNDER_WAY, with_calls
from infra.errors import EverloopError

IN_PROGRESS: dict[str, Any] = {
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "output": [],
    "usage": None,
}


async def events(turn: Turn) -> AsyncIterator[str]:
    """Yield the events of a turn that has begun; one that breaks off ends in ``response.failed``."""
    stream = _Stream(turn)
    for kind in ("response.created", "response.in_progress"):
        yield stream.event(kind, response=stream.now(**IN_PROGRESS))
    try:
        async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
            async for text in deltas:
                for one in stream.take(text):
                    yield one
    except EverloopError as error:
        failure = {"status": "failed", "error": view.error("server_error", f"{error.code}: {error.message}")}
        yield stream.event("response.failed", response=stream.now(**failure))
        return
    for one in stream.end():
        yield one


class _Stream:
    """What has been told of a turn, and how it goes on."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.recording = turn.recording
        self._numbers = count()
        self._num_items = 0
        self._num_steps = len(with_calls(self.recording.steps))
        self._text: str | None = None  # of the message that is being said, if one is
        self._told: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> str:
        return sse({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    def now(self, **changes: Any) -> dict[str, Any]:
        return view.response(self.recording.episode_id, self.turn.created, self.recording, **changes)

    def take(self, text: str) -> Iterator[str]:
        """Tell of a piece of text, or of a step: of its calls once something has come of each."""
        new = self.turn.take_logprobs()
        for step in self.turn.take_news():
            yield from self._end_message("completed")
            if step.get("carried") or not any(call["status"] in UNDER_WAY for call in step["calls"]):
                self._num_steps += not step.get("carried")
                for item in view.calls(step):
                    yield from self._call(item)
        if not text:
            return
        if self._text is None:
            yield from self._begin_message()
        self._text = (self._text or "") + text
        self._told += new
        yield self.event("response.output_text.delta", **self._at, delta=text, logprobs=new)

    def end(self) -> Iterator[str]:
        status = view.status_of(self.recording)
        self._told += self.turn.take_logprobs()
        told = list(self._told)
        yield from self._end_message(status)
        output = view.output(self.recording.episode_id, self.recording, told)
        yield self.event(f"response.{status}", response=self.now(output=output))

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._message("")["id"], "output_index": self._num_items, "content_index": 0}

    def _message(self, status: str, text: str = "") -> dict[str, Any]:
        name = self.recording.episode_id
        return view.message(name, text, status, self._told, num_steps=self._num_steps)

    def _begin_message(self) -> Iterator[str]:
        item = self._message("in_progress")
        yield self.event("response.output_item.added", output_index=self._num_items, item=item)
        yield self.event("response.content_part.added", **self._at, part=view.part(""))

    def _end_message(self, status: str) -> Iterator[str]:
        if self._text is None:
            return
        item = self._message(status, self._text)
        yield self.event("response.output_text.done", **self._at, text=self._text, logprobs=self._told)
        yield self.event("response.content_part.done", **self._at, part=view.part(self._text, self._told))
        yield self.event("response.output_item.done", output_index=self._num_items, item=item)
        self._num_items += 1
        self._text, self._told = None, []

    def _call(self, item: dict[str, Any]) -> Iterator[str]:
        at = {"item_id": item["id"], "output_index": self._num_items}
        kind, arguments = item["type"], item["arguments"]
        begun = {**item, "arguments": "", "status": "in_progress"}
        if kind == "mcp_approval_request":
            begun = item
        elif kind == "mcp_call":
            begun |= {"output": None, "error": None}
        yield self.event("response.output_item.added", output_index=self._num_items, item=begun)
        if kind != "mcp_approval_request":
            name = "response.function_call_arguments" if kind == "function_call" else "response.mcp_call_arguments"
            yield self.event(f"{name}.delta", **at, delta=arguments)
            yield self.event(f"{name}.done", **at, arguments=arguments, **_named(item))
        if kind == "mcp_call":
            yield self.event("response.mcp_call.in_progress", **at)
            yield self.event(f"response.mcp_call.{item['status']}", **at)
        yield self.event("response.output_item.done", output_index=self._num_items, item=item)
        self._num_items += 1


def _named(item: dict[str, Any]) -> dict[str, Any]:
    return {"name": item["name"]} if item["type"] == "function_call" else {}
