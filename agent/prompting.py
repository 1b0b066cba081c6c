"""What the model is to see of one request: made once, for all of its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread

from agent.book import Book
from agent.memory.encoding import Asking
from agent.memory.prompts import Wanted
from agent.schema import ChatRequest
from agent.tools.use import ToolUse
from feedback import items
from feedback.steps import plain
from infra.fleet import Fleet
from infra.settings import Settings


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt, and how it came about.

    Parameters
    ----------
    messages
        What the model sees first, with what tells it of tools.
    context
        How memory made it of what was said before; None where it did not.
    given
        What the request itself said, as far as the prompt says it otherwise (:func:`feedback.items.given`).
    count
        Counts the tokens of a text; None where nothing had to be counted.
    """

    messages: list[dict[str, Any]]
    context: dict[str, Any] | None = None
    given: dict[str, Any] | None = None
    count: Callable[[str], int] | None = None


@dataclass(frozen=True, slots=True)
class Prompter:
    """Makes prompts of requests."""

    book: Book
    fleet: Fleet
    settings: Settings

    def ask(self, body: ChatRequest) -> Asking | None:
        """Have the question of a request read, to be found again by what it says; None where nobody needs that."""
        if self.book.remembering is None or body.has_its_past or body.parent is None:
            return None
        said = [message.model_dump(exclude_none=True) for message in body.messages]
        return self.book.remembering.ask(said, body.conversation, body.parent)

    async def prompt(
        self,
        body: ChatRequest,
        tools: ToolUse,
        release: str,
        max_answer_tokens: int,
        *,
        explores: bool,
        asking: Asking | None = None,
    ) -> Prompted:
        """Return what a release is to see of a request, whose question may be being read already (:meth:`ask`).

        Raises
        ------
        InvalidRequestError
            Code ``context_length_exceeded``.
        """
        said = [message.model_dump(exclude_none=True) for message in body.messages]
        messages, context, count = said if tools.is_native else plain(said), None, None
        wanted = _wanted(body, tools, messages, max_answer_tokens, explores=explores, asking=asking)
        remembering = self.book.remembering
        if remembering is not None and not remembering.needs_nothing(wanted):
            made = await anyio.to_thread.run_sync(remembering.prompt, wanted)
            if self.settings.memory_refill == "model":
                write = partial(self._write_again, release, body.user)
                made = await made.written_by(write, remembering.counter())
            messages, context, count = made.messages, made.record, remembering.counter().text
        messages = tools.introduce(messages)
        own = body.own_messages(said)
        # What readers of the log take for it: see feedback/items.py.
        expected = len(own) if body.has_its_past else 1 if body.parent else len(messages)
        return Prompted(messages, context, items.given(own, messages, expected=expected), count)

    async def _write_again(self, release: str, user: str, messages: list[dict[str, Any]], max_tokens: int) -> str:
        """Have the release write a message again, shorter (:mod:`agent.memory.rewriting`)."""
        payload = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        text = ""
        async with self.fleet.stream_chat(release, payload, affinity=user, at_once=True) as events:
            async for event in events:
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        return text


def _wanted(
    body: ChatRequest,
    tools: ToolUse,
    messages: list[dict[str, Any]],
    max_answer_tokens: int,
    *,
    explores: bool,
    asking: Asking | None,
) -> Wanted:
    return Wanted(
        body.user,
        messages,
        None if body.has_its_past else body.conversation,
        body.parent,
        max_answer_tokens,
        truncate=body.truncation == "auto",
        explores=explores,
        tools=tools.told if tools.is_native else None,
        introduction=tools.introduction,
        reserved_tokens=tools.reserved_tokens,
        asking=asking,
    )
