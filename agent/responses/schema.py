"""What ``POST /v1/responses`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from agent.responses.place import Place
from agent.schema import MAX_MESSAGES, ChatRequest, Sampled, User
from agent.structured import ResponseFormat, for_engine
from infra.errors import InvalidRequestError
from infra.parameters import Content, Metadata, Only, OpenAIRequest, Speaker
from infra.text import CleanText

LOGPROBS = "message.output_text.logprobs"
EpisodeId = Annotated[CleanText, Field(min_length=1, max_length=64)]


class InputItem(OpenAIRequest):
    """A message; also one of an earlier response, as it was returned."""

    only: ClassVar[Mapping[str, Only]] = {
        "type": Only(("message",), "Only messages are read: send text, and no calls, files or references."),
        "status": Only(("in_progress", "completed", "incomplete"), "Leave it out."),
        "phase": Only(("commentary", "final_answer"), "Leave it out."),
    }

    role: Speaker
    content: Content
    id: str | None = Field(None, description="Not used.")


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
        "max_tool_calls": "No tools are called here; leave it out.",
        "moderation": "Nothing is moderated beside the answer; leave it out.",
        "prompt": "Prompts are not kept on the server: send `instructions` and `input`.",
        "prompt_cache_options": "Prompts are cached by what they begin with; leave it out.",
    }
    only: ClassVar[Mapping[str, Only]] = {
        "background": Only((False,), "Nothing runs in the background: stream, or wait for the answer."),
        "parallel_tool_calls": Only((True, False), "true or false; it changes nothing while no tools are called."),
        "prompt_cache_retention": Only(("in_memory",), "Prompts are cached in memory only; leave it out."),
        "reasoning": Only(({"effort": "none"},), "The model does not reason apart from its answer; leave it out."),
        "service_tier": Only(("auto", "default"), 'There is one tier: "auto" or "default", or leave it out.'),
        "tool_choice": Only(("auto", "none"), "No tools are called here; leave it out."),
        "tools": Only(([],), "No tools are called here; leave them out."),
        "truncation": Only(("disabled",), "Nothing is cut silently: send less, or begin a new conversation."),
    }

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

    @property
    def noted(self) -> dict[str, Any]:
        """What is kept with the episode, beside its messages and sampling."""
        form = for_engine(self.text.format) if self.text else None
        noted = {
            "metadata": self.metadata,
            "response_format": form,
            "instructions": self.instructions is not None,
            "unstored": not self.store,
        }
        return {
            "api": "responses",
            "num_input": len(self.input),
            **{name: value for name, value in noted.items() if value},
        }

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
        own = [item.model_dump(include={"role", "content"}) for item in self.input]
        messages = [*system, *before, *own]
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"With what was said before these are {len(messages)} messages; {MAX_MESSAGES} are taken. Begin "
                "a new conversation.",
                code="context_length_exceeded",
                param="input",
            )
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
                    "tool_choice": "none",  # an answer that waits for a yes has no form in a response
                    "response_format": for_engine(self.text.format) if self.text else None,
                }
            )
        except ValidationError as error:
            raise InvalidRequestError(f"input: {error.errors()[0]['msg']}", param="input") from error
        return chat.note(self.noted, parent=place.parent)
