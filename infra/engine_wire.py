"""What an engine's answers say: chunks of a stream, and refusals as our errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
import orjson

from infra.errors import EverloopError, InvalidRequestError, UnavailableError

MODEL_GONE = "release_loading"


class EngineError(EverloopError):
    """The engine refused or broke off a request."""

    status = 502
    code = "engine_error"


async def chunks(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a streamed answer; one that breaks off is an EngineError of code ``engine_failed``."""
    try:
        async with aclosing(_lines(response)) as lines:
            async for line in lines:
                if not line.startswith(b"data: "):
                    continue
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                yield chunk(data)
    except httpx.TransportError as error:
        raise EngineError("The engine went away in mid-answer.", code="engine_failed") from error


def chunk(data: bytes) -> dict[str, Any]:
    """Return a chunk, or a whole answer; what is neither is an EngineError of code ``engine_failed``."""
    try:
        chunk: dict[str, Any] = orjson.loads(data)
    except ValueError as error:
        raise EngineError("The engine sent what is no JSON.", code="engine_failed") from error
    if "error" in chunk or "choices" not in chunk:
        raise EngineError("The engine broke off the answer.", code="engine_failed")
    if any("text" in choice for choice in chunk["choices"]):
        chunk["choices"] = [_as_in_chat(choice) for choice in chunk["choices"]]
    return chunk


def _as_in_chat(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice of a plain completion in the form of a chat's."""
    told = choice.get("logprobs") or {}
    tops = told.get("top_logprobs") or [None] * len(told.get("tokens", ()))
    content = [
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": t, "logprob": p} for t, p in (top or {}).items()],
        }
        for token, logprob, top in zip(told.get("tokens", ()), told.get("token_logprobs", ()), tops, strict=True)
    ]
    return {**choice, "delta": {"content": choice["text"]}, "logprobs": {"content": content} if told else None}


async def at_once(chunk: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield a whole answer as a stream of one chunk."""
    yield chunk


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield the lines of an event stream.

    httpx's own lines also end at U+2028, U+0085 and others that an answer may hold as they are, within its JSON.
    """
    rest = b""
    async with aclosing(response.aiter_bytes()) as blocks:  # type: ignore[type-var]
        async for block in blocks:
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line.rstrip(b"\r")
    yield rest


def unavailable() -> UnavailableError:
    """Return the error of an engine that does not answer."""
    return UnavailableError(
        "The engine does not answer. Feedback still works; try the chat again in a few seconds.",
        code="engine_unavailable",
    )


async def read_refusal(response: httpx.Response) -> EverloopError:
    """Return the error of a response whose body is still to come."""
    try:
        await response.aread()
    except httpx.TransportError:
        return unavailable()
    return refusal(response)


def refusal(response: httpx.Response) -> EverloopError:
    """Return the error that a response other than 200 is to us."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    error = body.get("error", body) if isinstance(body, dict) else {}
    message = str(error.get("message") or response.text[:300])
    if response.status_code in (400, 422):
        too_long = "context length" in message or "maximum model length" in message
        code = "context_length_exceeded" if too_long else "invalid_request"
        return InvalidRequestError(message, code=code, param="messages" if too_long else None)
    if response.status_code == 404:
        # The release is gone from the engine (it restarted); the reconciler is loading it again.
        return UnavailableError("The engine is loading the release; try again.", code=MODEL_GONE)
    if response.status_code in (429, 500, 502, 503, 504):
        return UnavailableError("The engine is overloaded or failing; try again.", code="engine_unavailable")
    return EngineError(f"The engine answered {response.status_code}: {message}")
