"""The tools of one turn: what the model is told of them, what it calls, and when enough is enough."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio

from agent.schema import ChatRequest
from agent.tools import protocol, running
from agent.tools.protocol import Call, Reader
from agent.tools.results import estimated_tokens
from agent.tools.running import Entry
from agent.tools.tool import Caller
from agent.tools.toolbox import Offer
from feedback import steps as said
from infra.errors import InvalidRequestError
from infra.settings import Settings

MAX_CALLS = 16  # of one step
MAX_INVALID = 2  # steps in a row of which no call could be made
CALL_TOKENS = 64
LAST_TOKENS = 64  # of an answer for which results have left little room
POLL_S = 0.1
GIVE_UP_S = 1.0  # a tool that does not end when it is told to is left to itself
DENIED = "The person did not allow this call. Go on without it."
OFF_SINCE = "The tool has been turned off since."


class ToolUse:
    """What tools do in one turn.

    Attributes
    ----------
    steps
        What the episode says of them, as it grows (:mod:`feedback.steps`).
    count
        Counts the tokens of a text, for the limit of a result.
    stop
        Why no further step comes; None while one may.
    finish_reason
        What the client is told in place of the engine's reason; None for that one.
    """

    def __init__(
        self,
        settings: Settings,
        body: ChatRequest,
        offers: Mapping[str, Offer],
        caller: Caller | None,
        must_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self.body = body
        self.caller = caller
        self.must_end = must_end
        self.is_native = settings.tool_parser is not None
        self.offers = {} if body.tool_choice == "none" else dict(offers)
        self.client = {} if body.tool_choice == "none" else _client_functions(body, self.offers)
        self.forced = _forced(body, [*self.client, *self.offers])
        self.steps: list[dict[str, Any]] = []
        self.count: Callable[[str], int] = estimated_tokens
        self.stop: str | None = None
        self.is_short_of_room = False  # the next generation has to be a short one
        self.cut_off = False  # the last generation ended within a call
        self.finish_reason: str | None = None
        self._closing: str | None = None  # why the next generation is the last, and has no tools
        self._num_invalid = 0
        self._deadline_s = time.monotonic() + settings.tool_max_s

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """All tools of the turn, as OpenAI describes functions."""
        return [*self.client.values(), *(offer.tool.function() for offer in self.offers.values())]

    @property
    def told(self) -> list[dict[str, Any]]:
        """The tools, as an engine that tells the model of them itself is given them."""
        return [{"type": "function", "function": dict(function)} for function in self.functions]

    @property
    def reserved_tokens(self) -> int:
        """The room that a call and its result take after the prompt."""
        return self.settings.tool_result_max_tokens + CALL_TOKENS if self.offers else 0

    @property
    def introduction(self) -> str:
        """What the prompt tells the model of the tools; the rest of it has to leave room for that."""
        if self.is_native or not self.functions:
            return ""
        return protocol.introduction(self.functions, parallel=self.body.parallel_tool_calls)

    def introduce(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the prompt as the engine takes it, with what tells the model of the tools."""
        if self.is_native:
            return said.marked(messages)
        told = said.plain(messages)
        return protocol.introduced(told, self.introduction) if self.introduction else told

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what the next generation sees: the prompt of the first, and all that the steps added."""
        added = said.openai_messages(self.steps)
        return [*messages, *(said.marked(added) if self.is_native else said.plain(added))]

    def payload(self) -> dict[str, Any]:
        """Return what the engine is told for the next generation beside the prompt."""
        if not self.functions:
            return {}
        payload: dict[str, Any] = {}
        if self.num_tokens:
            left = min(self._max_tokens, self.settings.tool_max_tokens - self.num_tokens)
            payload["max_tokens"] = max(1, min(left, LAST_TOKENS) if self.is_short_of_room else left)
        if self.is_native:
            payload["tools"] = self.told
            payload["parallel_tool_calls"] = self.body.parallel_tool_calls
            payload["tool_choice"] = self._native_choice()
        elif self.forced is not None:
            payload |= protocol.constraint(self.functions, None if self.forced == "required" else self.forced)
        return payload

    def _native_choice(self) -> Any:
        if self.forced is None:
            return "none" if self._closing else "auto"
        if self.forced == "required":
            return "required"
        return {"type": "function", "function": {"name": self.forced}}

    @property
    def _max_tokens(self) -> int:
        return int(self.body.sampling(self.settings.max_answer_tokens)["max_tokens"])

    def reader(self) -> Reader:
        """Return what reads the next generation."""
        if not self.functions:
            return Reader()
        if self.is_native:
            return protocol.NativeReader()
        if self.forced is not None:
            return protocol.ForcedReader(None if self.forced == "required" else self.forced)
        return protocol.TextReader(is_over=self._closing is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens that the steps before the present generation generated."""
        return sum(step.get("tokens", 0) for step in self.steps)

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens that the steps of this turn read, and those that they wrote; without those gone on from."""
        return said.spent(self.steps)

    @property
    def last_step(self) -> dict[str, Any] | None:
        """The step that began last; None before the first."""
        return said.last_step(self.steps)

    @property
    def handed_over(self) -> list[Entry]:
        """The calls with which the turn ended: the client's to make, or to be allowed."""
        return [call for call in said.last_calls(self.steps) if call["status"] in ("handed_over", "pending")]

    def take(self, text: str, calls: Sequence[Call], num_tokens: int, num_prompt_tokens: int) -> None:
        """Begin a step: note what a generation called."""
        entries = [self._entry(call) for call in calls[:MAX_CALLS]]
        for entry in entries[1:] if not self.body.parallel_tool_calls else ():
            entry["status"], entry["error"] = "skipped", "One call at a time; the first was made."
        number = 1 + len(said.with_calls(self.steps))
        self.steps.append(
            {
                "step": number,
                "text": text,
                "offered": sorted(self.offers),
                "calls": entries,
                "tokens": num_tokens,
                "prompt_tokens": num_prompt_tokens,
            }
        )
        self.forced = None  # once: whoever must call a tool for ever never answers

    def _entry(self, call: Call) -> Entry:
        if call.tool in self.client:
            return running.entry(call, None, source="client")
        return running.entry(call, self.offers.get(call.tool))

    async def act(self) -> None:
        """Make the calls of the step, as far as they may be made, and say how it goes on."""
        calls = [call for call in self.steps[-1]["calls"] if call["status"] == "waiting"]
        clients = [call for call in calls if call["source"] == "client" and isinstance(call["arguments"], dict)]
        if clients:
            self._hand_over(clients, calls)
            return
        ready = [call for call in calls if running.check(call, self.offers)]
        asking = [call for call in ready if self.offers[call["tool"]].level == "ask"]
        expires_at = datetime.now(UTC) + timedelta(minutes=self.settings.approval_minutes)
        for call in asking:
            call["status"], call["expires_at"] = "pending", expires_at.isoformat()
        await self._run([call for call in ready if call not in asking])
        running.count(calls, self.offers)
        self._num_invalid = 0 if ready else self._num_invalid + 1
        if asking and self.stop is None:
            self.stop, self.finish_reason = "approval", "tool_calls"
        self._look_at_bounds()

    def _hand_over(self, clients: Sequence[Entry], calls: Sequence[Entry]) -> None:
        """End the turn with calls that are the client's; the server's own of the same step are not made."""
        for call in calls:
            call["status"] = "handed_over" if call in clients else "skipped"
        self.stop, self.finish_reason = "client_calls", "tool_calls"

    def _look_at_bounds(self) -> None:
        if self.stop is not None:
            return
        if time.monotonic() >= self._deadline_s:
            self.stop = "out_of_time"
        elif self.num_tokens >= self.settings.tool_max_tokens:
            self.stop = "out_of_tokens"
        elif self._num_invalid > MAX_INVALID:
            self._close("invalid_calls")
        elif len(said.with_calls(self.steps)) >= self.settings.tool_max_steps:
            self._close("max_steps")
        if self.stop is not None:
            self.finish_reason = "length"

    def _close(self, reason: str) -> None:
        """Have the model answer with what it has: the next generation is the last, and calls in it are left out."""
        self._closing = reason

    async def _run(self, calls: Sequence[Entry]) -> None:
        """Make calls, until the time of the turn is over, or the process must end."""
        if not calls or self.caller is None:
            return
        work = asyncio.ensure_future(running.run(calls, self.offers, self.caller, self.settings, self.count))
        try:
            while not work.done():
                left_s = self._deadline_s - time.monotonic()
                if left_s <= 0 or self.must_end():
                    self.stop = "out_of_time" if left_s <= 0 else "server_stopping"
                    self.finish_reason = "length"
                    break
                await asyncio.wait([work], timeout=min(POLL_S, left_s))
        finally:
            work.cancel()  # of what is done, nothing
            with anyio.move_on_after(GIVE_UP_S, shield=True):  # whoever waits may be cancelled, again and again
                await asyncio.wait([work])
        if work.done() and not work.cancelled():
            work.result()  # what fails here is a mistake of ours: a call's own failure is in its entry

    async def resume(self, episode_id: str, steps: Sequence[dict[str, Any]], allowed: Mapping[str, bool]) -> None:
        """Go on where another episode waited: make the calls that are allowed now.

        Parameters
        ----------
        allowed
            For the id of each call that waited, what was said of it.
        """
        self.steps += [{"continues": episode_id}]
        self.steps += [{**copy.deepcopy(dict(step)), "carried": True} for step in said.with_calls(steps)]
        self.forced = None
        waited = [call for call in self.steps[-1]["calls"] if call["id"] in allowed]
        granted = []
        for call in waited:
            call.pop("expires_at", None)
            if not allowed[call["id"]]:
                call["status"], call["error"] = "denied", DENIED
            elif call["tool"] not in self.offers:
                call["status"], call["error"] = "off", OFF_SINCE
            elif running.check(call, self.offers):
                granted.append(call)
        await self._run(granted)
        running.count(waited, self.offers)
        self._look_at_bounds()

    def end(self, status: str) -> None:
        """Note why the steps are over."""
        for step in self.steps:
            for call in step.get("calls", ()):
                if call["status"] in said.UNDER_WAY:
                    call["status"], call["error"] = "interrupted", call["error"] or "Given up before it ended."
        if (self.last_step or self.cut_off) and "stop" not in (self.steps or [{}])[-1]:
            answered = self._closing or ("cut_off" if self.cut_off else "answered")
            self.steps.append({"stop": self.stop or (answered if status == "complete" else status)})


def _client_functions(body: ChatRequest, offers: dict[str, Offer]) -> dict[str, Mapping[str, Any]]:
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in body.tools or ():
        function = tool.function
        if body.server_tools is None:
            offers.pop(function.name, None)  # the client says what it means by the name
        if function.name in functions or function.name in offers:
            raise InvalidRequestError(
                f"There are two tools {function.name!r} in `tools` and `server_tools`; leave one out.",
                code="duplicate_tool",
                param="tools",
            )
        functions[function.name] = function.model_dump(exclude_none=True)
    return functions


def _forced(body: ChatRequest, names: Sequence[str]) -> str | None:
    """Return the name of the tool that must be called, ``required`` for any, None for none."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    named = choice if isinstance(choice, str) else choice.function.name
    if not names or (named != "required" and named not in names):
        raise InvalidRequestError(
            f"No tool {named!r} is offered; name one of `tools` or of `server_tools` that is on for you.",
            code="unknown_tool",
            param="tool_choice",
        )
    return named
