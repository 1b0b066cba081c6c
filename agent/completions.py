"""``POST /v1/completions``: a text is gone on with as it stands, without the form of a chat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from agent.answers import usage
from agent.choices import Choices
from agent.exchange import choices_for, sse, streamed, whole
from agent.schema import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_STOPS,
    Bias,
    ChatRequest,
    Message,
    Sampled,
    StopText,
    StreamOptions,
    TokenId,
)
from agent.turn import Turn
from feedback.identity import UserHeader
from infra.access.gate import SignedIn, needs
from infra.access.roles import Role
from infra.errors import EverloopError
from infra.parameters import unsupported
from infra.text import CleanText

router = APIRouter(tags=["assistant"], dependencies=[needs(Role.USER)])
DEFAULT_MAX_TOKENS = 16  # as OpenAI's


def _one_text(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    if any(not isinstance(part, str) for part in prompt):
        raise unsupported("prompt", "Prompts of token ids are not read: send the text.")
    if len(prompt) != 1:
        raise unsupported("prompt", "One prompt a request: send each by itself.")
    return prompt[0]


class CompletionRequest(Sampled):
    """``POST /v1/completions``.

    The prompt goes to the model as it stands. That is no turn of a chat, so its episode is never learned from.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "best_of": "Ask for `n` answers, and choose; leave it out.",
        "suffix": "The model only goes on from a text; leave it out.",
    }

    prompt: Annotated[CleanText, BeforeValidator(_one_text), Field(min_length=1)]
    echo: bool = Field(
        False, description="Whether to return the prompt before what follows; its tokens are not told."
    )
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=MAX_BIASES)
    logprobs: int | None = Field(None, ge=0, le=5, description="How many tokens to name at each place.")
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def as_chat(self) -> ChatRequest:
        """Return the same as a request of a chat, whose one message is the prompt."""
        same = self.model_dump(exclude={"prompt", "echo", "logprobs", "stream_options"}, exclude_none=True)
        chat = ChatRequest(
            **same,
            messages=[Message(role="user", content=self.prompt)],
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            stream_options=self.stream_options,
            store=False,
            tool_choice="none",
        )
        return chat.note({"api": "completions", "unstored": True})


class CompletionTurn(Turn):
    """A turn whose prompt is a text, not a chat."""

    def _given(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {"prompt": messages[-1]["content"], "logprobs": self.body.top_logprobs}


@router.post("/v1/completions", response_model=None)
async def completions(
    body: CompletionRequest, caller: SignedIn, request: Request, x_everloop_user: UserHeader = None
) -> Response:
    """Go on with a text. The response's ``id`` is the episode's id; with ``n`` above 1, that of the first's."""
    choices = await choices_for(body.as_chat(), caller, request, x_everloop_user, CompletionTurn)
    before = body.prompt if body.echo else ""
    if not body.stream:
        return await whole(choices, caller, request, lambda: _whole(choices.turns, before))
    return await streamed(choices, caller, request, _events(choices, before, body.stream_options))


async def _events(choices: Choices, before: str, options: StreamOptions | None) -> AsyncIterator[str]:
    offsets = [len(before) for _ in choices.turns]
    try:
        if before:
            for turn in choices.turns:
                yield sse(_object(choices.first, [_choice(turn, before, None, 0)]))
        async with aclosing(choices.deltas()) as deltas:  # type: ignore[type-var]
            async for turn, text in deltas:
                reason = turn.recording.finish_reason if text is None else None
                yield sse(_object(choices.first, [_choice(turn, text or "", reason, offsets[turn.index])]))
                offsets[turn.index] += len(text or "")
    except EverloopError as error:
        yield sse(error.envelope())
        return
    if options and options.include_usage:
        yield sse({**_object(choices.first, []), "usage": usage(choices.turns)})
    yield "data: [DONE]\n\n"


def _whole(turns: Sequence[Turn], before: str) -> dict[str, Any]:
    told = [
        _choice(turn, before + turn.recording.answer, turn.recording.finish_reason, len(before)) for turn in turns
    ]
    return {**_object(turns[0], told), "usage": usage(turns)}


def _object(first: Turn, choices: list[dict[str, Any]]) -> dict[str, Any]:
    recording = first.recording
    return {
        "id": recording.episode_id,
        "object": "text_completion",
        "created": first.created,
        "model": recording.release,
        "choices": choices,
    }


def _choice(turn: Turn, text: str, finish_reason: str | None, offset: int) -> dict[str, Any]:
    return {
        "index": turn.index,
        "text": text,
        "logprobs": _logprobs(turn.take_logprobs(), offset) if turn.body.logprobs else None,
        "finish_reason": finish_reason,
        "episode_id": turn.recording.episode_id,
    }


def _logprobs(told: Sequence[dict[str, Any]], offset: int) -> dict[str, Any]:
    """Return log-probabilities in the older form; `offset` is where the first token begins in the text."""
    offsets = []
    for entry in told:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in told],
        "token_logprobs": [entry["logprob"] for entry in told],
        "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in told],
        "text_offset": offsets,
    }
