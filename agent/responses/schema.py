"""What ``POST /v1/responses`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from agent.responses.input import ApprovalItem, InputItem, as_messages, joined
from agent.responses.place import Place
from agent.schema import MAX_MESSAGES, ChatRequest, Function, Sampled, User
from agent.structured import ResponseFormat, for_engine
from infra.errors import InvalidRequestError
from infra.parameters import UNSUPPORTED, Metadata, Only, OpenAIRequest
from infra.text import CleanText

LOGPROBS = "message.output_text.logprobs"
# What may be said of an answer that goes on after a yes; all else was said when it was asked for.
GOING_ON = frozenset(
    (
        *("model", "input", "previous_response_id", "conversation", "stream", "stream_options", "tools"),
        *("user", "safety_identifier"),
    )
)
EpisodeId = Annotated[CleanText, Field(min_length=1, max_length=64)]


class FunctionTool(Function):
    """A function of the client's that the model may call."""

    only: ClassVar[Mapping[str, Only]] = {
        "type": Only(("function",), "Send functions of yours; tools of the server are named in `server_tools`."),
        "async": Only((False,), "A call is waited for; leave it out."),
        "defer_loading": Only((False,), "All tools are told to the model; leave it out."),
        "allowed_callers": Only((["direct"],), "The model alone calls; leave it out."),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "output_schema": "Outputs are text; say in `description` how to read them."
    }

    def as_chat(self) -> dict[str, Any]:
        """Return it as a chat names a tool."""
        return {"type": "function", "function": self.model_dump(exclude_none=True)}


class FunctionChoice(OpenAIRequest):
    """The tool that must be called: of the client's, or of the server's."""

    only: ClassVar[Mapping[str, Only]] = {
        "type": Only(("function",), 'Name one tool: {"type": "function", "name": …}, or send "required".')
    }

    name: CleanText = Field(min_length=1, max_length=64)


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[FunctionChoice, Tag("function")],
    Discriminator(lambda given: "mode" if isinstance(given, str) else "function"),
]


class TextOptions(OpenAIRequest):
    """In what form the answer is to be."""

    only: ClassVar[Mapping[str, Only]] = {
        "verbosity": Only(("medium",), "Say in the instructions how long answers are to be.")
    }

    format: ResponseFormat | None = None


class StreamOptions(OpenAIRequest):
    """Options of a stream."""

    only: ClassVar[Mapping[str, Only]] = {
        "include_obfuscation": Only((False,), "Streams are not padded: false, or leave it out.")
    }


class ConversationName(OpenAIRequest):
    """A conversation by its id."""

    id: CleanText = Field(min_length=1, max_length=64)


def _named(conversation: Any) -> Any:
    return {"id": conversation} if isinstance(conversation, str) else conversation


def _items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponseRequest(Sampled):
    """``POST /v1/responses``.

    The response is an episode, and its ``id`` the episode's. With ``store`` false it is not learned from and cannot
    be asked for again here; the log keeps it, as it keeps every answer.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "access_programs": "There are none; leave it out.",
        "background_options": "Nothing runs in the background; leave it out.",
        "context_management": "Contexts are not compacted on request; leave it out.",
        "image": "Only text is answered; leave it out.",
        "max_tool_calls": "How many steps there are is the operator's to say; leave it out.",
        "moderation": "Nothing is moderated beside the answer; leave it out.",
        "prompt": "Prompts are not kept on the server: send `instructions` and `input`.",
        "prompt_cache_options": "Prompts are cached by what they begin with; leave it out.",
    }
    only: ClassVar[Mapping[str, Only]] = {
        "background": Only((False,), "Nothing runs in the background: stream, or wait for the answer."),
        "prompt_cache_retention": Only(("in_memory",), "Prompts are cached in memory only; leave it out."),
        "reasoning": Only(({"effort": "none"},), "The model does not reason apart from its answer; leave it out."),
        "service_tier": Only(("auto", "default"), 'There is one tier: "auto" or "default", or leave it out.'),
    }
    own: ClassVar[frozenset[str]] = frozenset({"server_tools"})

    input: Annotated[list[InputItem], BeforeValidator(_items), Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: CleanText | None = Field(
        None, min_length=1, description="For this answer, not for those after it."
    )
    previous_response_id: EpisodeId | None = Field(None, description="The episode that this goes on from.")
    conversation: Annotated[ConversationName, BeforeValidator(_named)] | None = None
    safety_identifier: User | None = Field(
        None, description="As `user`, where that is not given and the key may act for others; else it is not used."
    )
    prompt_cache_key: CleanText | None = Field(
        None, min_length=1, max_length=128, description="Requests of the same key go to the same replica."
    )
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list, max_length=1)
    top_logprobs: int = Field(0, ge=0, le=20)
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: Metadata | None = Field(None, description="Kept with the episode.")
    store: bool = Field(True, description="Whether it may be learned from, and be asked for again.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=128)
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True
    server_tools: list[CleanText] | None = Field(
        None,
        max_length=128,
        description="The server's tools that may be called; unset, all that are on for the user.",
    )
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="Whether a message that is too long is cut in its middle, or refused."
    )

    @property
    def approvals(self) -> dict[str, bool]:
        """What is said to calls that wait, by their ids.

        Raises
        ------
        InvalidRequestError
            Codes ``approvals_alone`` where there is more in the input, ``unsupported_parameter`` for what can no
            longer be changed.
        """
        said = {item.approval_request_id: item.approve for item in self.input if isinstance(item, ApprovalItem)}
        if not said:
            return {}
        if len(said) < len(self.input):
            raise InvalidRequestError(
                "A yes or a no goes alone, each once: send other items with the response after it.",
                code="approvals_alone",
                param="input",
            )
        if self.previous_response_id is None and self.conversation is None:
            raise InvalidRequestError(
                "Name the response that waits by `previous_response_id`.",
                code="tool_call_not_found",
                param="previous_response_id",
            )
        fixed = sorted(name for name in self.model_fields_set - GOING_ON if getattr(self, name) is not None)
        if fixed:
            raise InvalidRequestError(
                "What comes after a yes is the same answer, as it was asked for: leave it out.",
                code=UNSUPPORTED,
                param=fixed[0],
            )
        return said

    @property
    def noted(self) -> dict[str, Any]:
        """What is kept with the episode, beside its messages and sampling."""
        form = for_engine(self.text.format) if self.text else None
        noted = {
            "metadata": self.metadata,
            "response_format": form,
            "instructions": self.instructions,
            "unstored": not self.store,
            "tools": [{"type": "function", **tool.model_dump()} for tool in self.tools],
            "tool_choice": self._choice if self.tool_choice != "auto" else None,
            "one_call": not self.parallel_tool_calls,
            "truncation": self.truncation if self.truncation != "disabled" else None,
        }
        return {
            "api": "responses",
            "num_input": len(as_messages(self.input)),
            **{name: value for name, value in noted.items() if value},
        }

    @property
    def _choice(self) -> Any:
        choice = self.tool_choice
        return choice if isinstance(choice, str) else {"type": "function", "name": choice.name}

    def as_chat(self, user: str, before: Sequence[dict[str, Any]], place: Place) -> ChatRequest:
        """Return the same as a request of a chat.

        Parameters
        ----------
        before
            What was said before, as messages.
        place
            Where it stands: in which conversation if in one, and which episode it follows.

        Raises
        ------
        InvalidRequestError
            Param ``input``.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages = [*system, *joined(before, as_messages(self.input))]
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"With what was said before these are {len(messages)} messages; {MAX_MESSAGES} are taken. Begin "
                "a new conversation.",
                code="context_length_exceeded",
                param="input",
            )
        choice = self.tool_choice
        named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        wants_logprobs = LOGPROBS in self.include or self.top_logprobs > 0
        try:
            chat = ChatRequest.model_validate(
                {
                    "model": self.model,
                    "messages": messages,
                    "user": user,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "max_completion_tokens": self.max_output_tokens,
                    "prompt_cache_key": self.prompt_cache_key,
                    "store": self.store,
                    "stream": self.stream,
                    "logprobs": wants_logprobs,
                    "top_logprobs": self.top_logprobs,
                    "conversation": place.conversation,
                    "tools": [tool.as_chat() for tool in self.tools] or None,
                    "tool_choice": named,
                    "parallel_tool_calls": self.parallel_tool_calls,
                    "server_tools": self.server_tools,
                    "truncation": self.truncation,
                    "response_format": for_engine(self.text.format) if self.text else None,
                }
            )
        except ValidationError as error:
            raise InvalidRequestError(f"input: {error.errors()[0]['msg']}", param="input") from error
        return chat.note(self.noted, parent=place.parent)
