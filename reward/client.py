"""Asking the reward worker for scores and vectors; whoever asks runs no model."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from infra.errors import EverloopError, UnavailableError
from reward.embedding_wire import Embedded, EmbedRequest
from reward.scored import ScoreBatch, ScoreRequest


async def score(client: httpx.AsyncClient, body: ScoreRequest, timeout_s: float | None = None) -> ScoreBatch:
    """Return the scores of answers.

    Parameters
    ----------
    timeout_s
        How long to wait; the client's own time, if unset.

    Raises
    ------
    EverloopError
        Code ``reward_unavailable`` where it does not answer in time, or what it refused with.
    """
    try:
        response = await client.post(
            "/v1/rewards/score",
            json=body.model_dump(),
            timeout=httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s,
        )
    except httpx.TransportError as error:
        raise _unavailable() from error
    if response.status_code != 200:
        raise _passed_on(response)
    return ScoreBatch.model_validate(response.json())


def embed(client: httpx.Client, texts: Sequence[str], timeout_s: float, *, is_awaited: bool = False) -> Embedded:
    """Return the vectors of texts, before those that nobody waits for where somebody does.

    Raises
    ------
    EverloopError
        Code ``reward_unavailable`` where it does not answer in time, or what it refused with.
    """
    body = EmbedRequest(texts=list(texts), is_awaited=is_awaited).model_dump()
    try:
        response = client.post("/v1/embeddings", json=body, timeout=timeout_s)
    except httpx.TransportError as error:
        raise _unavailable() from error
    if response.status_code != 200:
        raise _passed_on(response)
    return Embedded.model_validate(response.json())


def _unavailable() -> UnavailableError:
    return UnavailableError(
        "The reward worker does not answer; try again in a few seconds.", code="reward_unavailable"
    )


def _passed_on(response: httpx.Response) -> EverloopError:
    is_json = response.headers.get("content-type") == "application/json"
    error = response.json().get("error", {}) if is_json else {}
    found = EverloopError(error.get("message", "The reward worker failed."), code=error.get("code"))
    found.status, found.type = response.status_code, error.get("type", found.type)
    return found
