"""A response as the events of its stream, in the order in which OpenAI's API sends them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import count
from typing import Any

from agent.exchange import sse
from agent.responses import view
from agent.turn import Turn
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
    recording = turn.recording
    told: list[dict[str, Any]] = []
    numbers = count()
    at = {"item_id": view.message(recording.episode_id, "", "")["id"], "output_index": 0, "content_index": 0}

    def event(kind: str, **fields: Any) -> str:
        return sse({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    def now(**changes: Any) -> dict[str, Any]:
        return view.response(recording.episode_id, turn.created, recording, **changes)

    def begin() -> Iterator[str]:
        yield event("response.created", response=now(**IN_PROGRESS))
        yield event("response.in_progress", response=now(**IN_PROGRESS))
        item = view.message(recording.episode_id, "", "in_progress")
        yield event("response.output_item.added", output_index=0, item=item)
        yield event("response.content_part.added", **at, part=view.part(""))

    def end() -> Iterator[str]:
        status = view.status_of(recording)
        item = view.message(recording.episode_id, recording.answer, status, told)
        part = view.part(recording.answer, told)
        yield event("response.output_text.done", **at, text=recording.answer, logprobs=told)
        yield event("response.content_part.done", **at, part=part)
        yield event("response.output_item.done", output_index=0, item=item)
        output = [item] if recording.answer else []
        yield event(f"response.{status}", response=now(output=output))

    try:
        for one in begin():
            yield one
        async with aclosing(turn.deltas()) as deltas:  # type: ignore[type-var]
            async for text in deltas:
                new = turn.take_logprobs()
                told += new
                yield event("response.output_text.delta", **at, delta=text, logprobs=new)
    except EverloopError as error:
        failure = {"status": "failed", "error": view.error("server_error", f"{error.code}: {error.message}")}
        yield event("response.failed", response=now(**failure))
        return
    told += turn.take_logprobs()
    for one in end():
        yield one
