"""OpenAI's wire format, as far as Everloop speaks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from agent.structured import ChatFormat, for_engine
from agent.tools.tool import validator
from infra.access.roles import ANONYMOUS, Caller
from infra.errors import InvalidRequestError
from infra.parameters import Metadata, Only, OpenAIRequest, as_text, mistaken
from infra.settings import ASSISTANT_MODEL
from infra.text import CleanText

MAX_MESSAGES = 512
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_BIASES = 1024


class ErrorBody(BaseModel):
    """What was wrong and what to do."""

    message: str
    type: str = Field(description="invalid_request_error, or server_error where it is our fault.")
    param: str | None = Field(description="The field at fault, if one is.")
    code: str = Field(description="Stable identifier; clients may branch on it.")


class ErrorEnvelope(BaseModel):
    """How every error looks under ``/v1``."""

    error: ErrorBody


class CalledFunction(BaseModel):
    """What was called, with its arguments as JSON text."""

    name: CleanText = Field(min_length=1, max_length=64)
    arguments: CleanText


class MessageCall(BaseModel):
    """A call of a tool in a message of the assistant's."""

    id: CleanText = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(OpenAIRequest):
    """One message of a conversation; text only, whole or in parts. ``developer`` is another word for ``system``."""

    refused: ClassVar[Mapping[str, str]] = {
        "name": "Say in the message who speaks; the model is shown no names.",
        "refusal": "Send what was said as `content`.",
        "audio": "Only text is read; send `content`.",
        "function_call": "It is deprecated; send `tool_calls`.",
        "annotations": "Send what was said as `content`.",
    }

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        BeforeValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[CleanText, BeforeValidator(as_text)] | None = None
    tool_calls: list[MessageCall] | None = Field(None, min_length=1, max_length=128)
    tool_call_id: CleanText | None = Field(None, min_length=1, max_length=128)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise mistaken("tool_calls", "Only a message of the assistant's has `tool_calls`.")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise mistaken("tool_call_id", "A message of role `tool`, and no other, names its call.")
        if not self.content and not self.tool_calls and self.role != "tool":
            raise mistaken("content", "A message has at least 1 character.")
        return self


class Function(OpenAIRequest):
    """A function that the model may call."""

    name: CleanText = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: CleanText | None = Field(None, max_length=4096)
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of its arguments, an object's.")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Function:
        if self.parameters is not None:
            validator(self.parameters)
        return self


class ClientTool(OpenAIRequest):
    """A tool of the client's: its calls are returned, to be made there."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(OpenAIRequest):
    """A function by its name."""

    name: CleanText


class NamedTool(OpenAIRequest):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class StreamOptions(OpenAIRequest):
    """Options of a stream."""

    only: ClassVar[Mapping[str, Only]] = {
        "include_obfuscation": Only((False,), "Streams are not padded; leave it out.")
    }

    own: ClassVar[frozenset[str]] = frozenset({"include_steps"})

    include_usage: bool = False
    include_steps: bool = Field(False, description="Also tell of calls that the server makes, in `step`.")


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[CleanText, Field(min_length=1, max_length=256)]
User = Annotated[CleanText, Field(min_length=1, max_length=128)]


class Sampled(OpenAIRequest):
    """What every way to ask has in common."""

    model: CleanText = Field(
        min_length=1, max_length=128, description="`everloop`, a release, or a run in progress."
    )
    user: User = Field(ANONYMOUS, description="Whom the answer is for, where the key may act for others.")
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)

    def for_whom(self, caller: Caller, header: str | None = None) -> str:
        """Return whom the answer is for.

        Raises
        ------
        ForbiddenError
            Code ``not_you``.
        """
        other = getattr(self, "safety_identifier", None) if caller.acts_for_others else None
        named = self.user if self.user != ANONYMOUS else other or header
        return caller.speaks_for(named) or ANONYMOUS


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``.

    ``model`` is ``everloop`` (the deployed assistant), the name of a release, or a run in progress.
    ``store: false`` keeps the episode out of everything that learns.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": ASSISTANT_MODEL,
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "user": "ada",
                    "stream": True,
                }
            ]
        },
    )
    refused: ClassVar[Mapping[str, str]] = {
        "audio": "Only text is answered; leave it out.",
        "function_call": "It is deprecated; send `tool_choice`.",
        "functions": "They are deprecated; send `tools`.",
        "moderation": "Nothing is moderated beside the answer; leave it out.",
        "prediction": "Nothing is gained by a prediction here; leave it out.",
        "prompt_cache_options": "Prompts are cached by what they begin with; leave it out.",
        "web_search_options": "Nothing is looked up on the web; leave it out.",
    }
    only: ClassVar[Mapping[str, Only]] = {
        "modalities": Only((["text"],), 'Only text is answered: ["text"], or leave it out.'),
        "prompt_cache_retention": Only(("in_memory",), "Prompts are cached in memory only; leave it out."),
        "reasoning_effort": Only(("none",), "The model does not reason apart from its answer; leave it out."),
        "service_tier": Only(("auto", "default"), 'There is one tier: "auto" or "default", or leave it out.'),
        "verbosity": Only(("medium",), "Say in a system message how long answers are to be."),
    }
    own: ClassVar[frozenset[str]] = frozenset({"conversation", "parent", "server_tools", "truncation"})

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    safety_identifier: User | None = Field(
        None, description="As `user`, where that is not given and the key may act for others; else it is not used."
    )
    prompt_cache_key: CleanText | None = Field(
        None, min_length=1, max_length=128, description="Requests of the same key go to the same replica."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = Field(True, description="Whether it may be learned from, and be asked for again.")
    metadata: Metadata | None = Field(None, description="Kept with the episode.")
    conversation: CleanText | None = Field(
        None, min_length=1, max_length=64, description="The conversation that this is kept in as a turn."
    )
    parent: CleanText | None = Field(
        None, min_length=1, max_length=64, description="The episode there that this follows; none for a first turn."
    )
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="Whether a message that is too long is cut in its middle, or refused."
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Choice i is sampled with this seed plus i.")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(None)
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="How many answers; each is an episode of its own.")
    logprobs: bool = Field(False, description="Whether to return the log-probability of each token.")
    top_logprobs: int = Field(0, ge=0, le=20, description="How many other tokens to name at each place.")
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=MAX_BIASES)
    response_format: ChatFormat | None = None
    tools: list[ClientTool] | None = Field(None, min_length=1, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    server_tools: list[CleanText] | None = Field(
        None,
        max_length=128,
        description="The server's tools that may be called; unset, all that are on for the user.",
    )
    _noted: dict[str, Any] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _someone_asks(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError("The last message must be from the user (or the system), not the assistant.")
        if self.parent is not None and self.conversation is None:
            raise mistaken("parent", "A `parent` is an episode of a conversation; name the `conversation`, too.")
        if self.top_logprobs and not self.logprobs:
            raise mistaken("top_logprobs", "`top_logprobs` needs `logprobs`: true.")
        return self

    def sampling(self, default_max_tokens: int, choice: int = 0) -> dict[str, Any]:
        """Return the sampling parameters of a choice that go to the engine and into the episode."""
        values: dict[str, Any] = {
            "max_tokens": self.max_completion_tokens or self.max_tokens or default_max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        if self.seed is not None:
            values["seed"] = self.seed + choice if self.seed + choice < 2**63 else self.seed + choice - 2**64
        if self.stop:
            values["stop"] = self.stop
        if self.logit_bias:
            values["logit_bias"] = self.logit_bias
        return values

    def shape(self) -> dict[str, Any]:
        """Return what the engine is told of the form of the answer."""
        form = for_engine(self.response_format)
        return {"response_format": form} if form else {}

    def note(self, noted: dict[str, Any], *, parent: str | None = None) -> Self:
        """Keep something with the episode, and which one it follows outside any conversation."""
        self._noted = noted
        if parent is not None:
            self.parent = parent
        return self

    def own_messages(self, said: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, of all that were `said`, that are new with this request.

        Who asks by chat completions sends all of them each time. Of what follows a turn that is known the question
        alone is new, or the results of the calls that the turn ended with.
        """
        if (num_input := (self._noted or {}).get("num_input")) is not None:
            return said[-num_input:]
        if self.parent is None:
            return said
        num_results = next((at for at, each in enumerate(reversed(said)) if each["role"] != "tool"), len(said))
        return said[-max(num_results, 1) :]

    @property
    def has_its_past(self) -> bool:
        """Whether all that was said before is among the messages, put there by the server itself."""
        return bool(self._noted and self._noted.get("api") == "responses")

    @property
    def noted(self) -> dict[str, Any] | None:
        """What is kept with the episode of how it was asked for (:class:`feedback.tables.Episode`)."""
        if self._noted is not None:
            return self._noted
        form = for_engine(self.response_format)
        noted = {"metadata": self.metadata, "response_format": form, "unstored": not self.store}
        noted["one_call"] = not self.parallel_tool_calls
        return {name: value for name, value in noted.items() if value} or None


def check_budget(max_tokens: int, max_model_tokens: int) -> None:
    """Refuse an answer length that leaves no room for the question.

    Raises
    ------
    InvalidRequestError
        Code ``context_length_exceeded``.
    """
    if max_tokens >= max_model_tokens:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}, but the model holds {max_model_tokens} tokens in all.",
            code="context_length_exceeded",
            param="max_tokens",
        )
