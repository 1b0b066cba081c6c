"""What stands in the ``input`` of a response: messages, calls with what they returned, and a yes or a no."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from feedback.items import Item, messages
from infra.errors import InvalidRequestError
from infra.parameters import Content, Only, OpenAIRequest, Speaker, as_text
from infra.text import CleanText

STATUS = Only(("in_progress", "completed", "incomplete"), "Leave it out.")
ELSEWHERE = ("caller", "namespace")  # of calls that programs make
CallId = Annotated[CleanText, Field(min_length=1, max_length=128)]


class MessageItem(OpenAIRequest):
    """A message; also one of an earlier response, as it was returned."""

    only: ClassVar[Mapping[str, Only]] = {
        "type": Only(("message",), "Send messages, calls of functions with their outputs, or a yes to a call."),
        "status": STATUS,
        "phase": Only(("commentary", "final_answer"), "Leave it out."),
    }

    role: Speaker
    content: Content
    id: str | None = Field(None, description="Not used.")


class CallItem(OpenAIRequest):
    """A call that a model made of a function of the client's."""

    only: ClassVar[Mapping[str, Only]] = {"status": STATUS, "async": Only((False,), "Leave it out.")}
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(ELSEWHERE, "Only a model calls; leave it out.")

    type: Literal["function_call"]
    call_id: CallId
    name: CallId
    arguments: CleanText
    id: str | None = Field(None, description="Not used.")


class OutputItem(OpenAIRequest):
    """What a function of the client's returned; text only."""

    only: ClassVar[Mapping[str, Only]] = {"status": STATUS}
    refused: ClassVar[Mapping[str, str]] = {
        "name": "The call is named by `call_id`; leave it out.",
        **dict.fromkeys(ELSEWHERE, "Only a model calls; leave it out."),
    }

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[CleanText, BeforeValidator(as_text)]
    id: str | None = Field(None, description="Not used.")


class ServerCallItem(OpenAIRequest):
    """A call of a tool of the server's in an earlier response, as it was returned."""

    only: ClassVar[Mapping[str, Only]] = {"status": Only((*STATUS.values, "calling", "failed"), "Leave it out.")}

    type: Literal["mcp_call"]
    id: CallId
    name: CallId
    arguments: CleanText
    server_label: CleanText = Field(description="Not used.")
    output: CleanText | None = None
    error: dict[str, Any] | None = None
    approval_request_id: str | None = Field(None, description="Not used.")


class ApprovalItem(OpenAIRequest):
    """A yes or a no to a call that waits."""

    refused: ClassVar[Mapping[str, str]] = {"reason": "Say in a message why; the call is told yes or no."}

    type: Literal["mcp_approval_response"]
    approval_request_id: CallId
    approve: bool
    id: str | None = Field(None, description="Not used.")


KINDS = ("message", "function_call", "function_call_output", "mcp_call", "mcp_approval_response")


def _kind(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return kind if kind in KINDS else "message"  # which says what is taken


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ServerCallItem, Tag("mcp_call")]
    | Annotated[ApprovalItem, Tag("mcp_approval_response")],
    Discriminator(_kind),
]


def as_messages(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Return items of an input as messages of a chat."""
    return messages(each for item in given for each in _items(item))


def _items(item: Any) -> Iterator[Item]:
    match item:
        case CallItem():
            called = {"id": item.call_id, "name": item.name, "arguments": item.arguments}
            yield Item("", "assistant", "", call=called)
        case OutputItem():
            yield Item("", "tool", item.output, call_id=item.call_id)
        case ServerCallItem():
            yield Item("", "assistant", "", call={"id": item.id, "name": item.name, "arguments": item.arguments})
            said = item.output if item.error is None else f"Error: {item.error.get('content', item.error)}"
            yield Item("", "tool", said or "", call_id=item.id)
        case MessageItem():
            yield Item("", item.role, item.content)


def joined(before: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was said before with what is said now, each call with its output.

    A call of before that nobody answered is left out.

    Raises
    ------
    InvalidRequestError
        Codes ``tool_call_not_found`` for an output without its call, ``tool_output_missing`` for a call in the
        input itself without its output.
    """
    returned = {message["tool_call_id"] for message in (*before, *own) if message["role"] == "tool"}
    known: set[str] = set()
    found = []
    for message in before:
        calls = [call for call in message.get("tool_calls", ()) if call["id"] in returned]
        known |= {call["id"] for call in calls}
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        if message["role"] == "tool" and message["tool_call_id"] not in known:
            continue
        if calls or message.get("content") or message["role"] == "tool":
            found.append({**rest, **({"tool_calls": calls} if calls else {})})
    for message in own:
        known |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in known:
            raise InvalidRequestError(
                f"There is no call {message['tool_call_id']!r} before this output: name the response of it "
                "by `previous_response_id`, or send the `function_call`, too.",
                code="tool_call_not_found",
                param="input",
            )
        if missing := [call["id"] for call in message.get("tool_calls", ()) if call["id"] not in returned]:
            raise InvalidRequestError(
                f"The call {missing[0]!r} has no output: send its `function_call_output`, too.",
                code="tool_output_missing",
                param="input",
            )
    return [*found, *own]
