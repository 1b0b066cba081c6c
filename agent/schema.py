"""OpenAI's wire format, as far as Everloop speaks it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.errors import InvalidRequestError
from infra.settings import ASSISTANT_MODEL
from infra.text import CleanText

MAX_MESSAGES = 512


class ErrorBody(BaseModel):
    """What was wrong and what to do."""

    message: str
    type: str = Field(description="invalid_request_error, or server_error where it is our fault.")
    param: str | None = Field(description="The field at fault, if one is.")
    code: str = Field(description="Stable identifier; clients may branch on it.")


class ErrorEnvelope(BaseModel):
    """How every error looks under ``/v1``."""

    error: ErrorBody


class Message(BaseModel):
    """One message of a conversation; text only."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: CleanText = Field(min_length=1)


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``.

    ``model`` is ``everloop`` (the deployed assistant), the name of a release, or a run in progress.
    ``store: false`` keeps the episode out of everything that learns.
    """

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
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

    model: CleanText = Field(min_length=1, max_length=128)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    user: CleanText = Field("anonymous", min_length=1, max_length=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = Field(True, description="Whether this answer may be learned from.")
    metadata: dict[str, str] | None = None
    conversation: CleanText | None = Field(
        None, min_length=1, max_length=64, description="The conversation that this is kept in as a turn."
    )
    parent: CleanText | None = Field(
        None, min_length=1, max_length=64, description="The episode there that this follows; none for a first turn."
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: CleanText | list[CleanText] | None = Field(None)
    n: Literal[1] = 1

    @model_validator(mode="after")
    def _someone_asks(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError("The last message must be from the user (or the system), not the assistant.")
        if self.parent is not None and self.conversation is None:
            raise ValueError("A `parent` is an episode of a conversation; name the `conversation`, too.")
        return self

    def sampling(self, default_max_tokens: int) -> dict[str, Any]:
        """Return the sampling parameters that go to the engine and into the episode."""
        values: dict[str, Any] = {
            "max_tokens": self.max_completion_tokens or self.max_tokens or default_max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        if self.seed is not None:
            values["seed"] = self.seed
        if self.stop:
            values["stop"] = self.stop
        return values


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


def chunk(
    episode_id: str, created: int, model: str, delta: dict[str, Any], finish_reason: str | None = None
) -> dict[str, Any]:
    """Return one ``chat.completion.chunk``."""
    return {
        "id": episode_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def completion(
    episode_id: str, created: int, model: str, answer: str, finish_reason: str | None, used: dict[str, int]
) -> dict[str, Any]:
    """Return a whole ``chat.completion``."""
    return {
        "id": episode_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": used,
    }
