"""Fresh samples from the engine that serves: their text, and the token ids and log-probabilities really used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from infra.engine import EngineClient
from infra.engine_wire import MODEL_GONE
from infra.errors import EverloopError, InvalidRequestError, UnavailableError
from infra.settings import Settings
from trainer.config import RunConfig
from trainer.throttle import Throttle

log = logging.getLogger("everloop.night")
T = TypeVar("T")
Restore = Callable[[EngineClient], Awaitable[None]]

MAX_IN_FLIGHT = 32
PATIENCE_S = 120.0  # an engine that is started anew is back within a minute
ASK_AGAIN_S = 2.0
BESIDE_PEOPLE = 1  # samples in flight while somebody else asks


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer.

    Attributes
    ----------
    prompt_ids, token_ids
        What the model was given and what it said, as the engine saw both.
    logprobs
        Of each token when it was sampled (nats).
    model
        Who said it: the name of an immutable version.
    """

    text: str
    finish_reason: str
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    model: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Sampling:
        """Return what a run's configuration says."""
        return cls(config.max_answer_tokens, config.temperature, config.top_p, config.top_k)

    @property
    def is_plain(self) -> bool:
        """Whether log-probabilities are those of the model as it is."""
        return self.temperature == 1.0 and self.top_p == 1.0 and not self.top_k

    def payload(self) -> dict[str, Any]:
        """Return the fields of a request."""
        cut: dict[str, Any] = {"top_k": self.top_k} if self.top_k else {}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, **cut}


async def sample(
    engine: EngineClient,
    model: str,
    prompts: Sequence[list[dict[str, Any]]],
    *,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    on_done: Callable[[int], None] = lambda done: None,
    restore: Restore | None = None,
    throttle: Throttle | None = None,
) -> list[list[Sample]]:
    """Sample `num_samples` answers to each prompt; requests of people go first.

    Each sample is a request of its own: the engine counts sequences, and one that is over makes room at once.

    Parameters
    ----------
    on_done
        Called with the number of finished prompts after each.
    restore
        Loads the model again where the engine, started anew, has lost it; of a release others take care.
    throttle
        What keeps people's requests first; by default one of its own.

    Returns
    -------
    list of list of Sample
        One list per prompt, in the order of `prompts`; empty for a prompt that the engine refused.
    """
    gate = throttle or Throttle(MAX_IN_FLIGHT, BESIDE_PEOPLE)
    mend = partial(restore, engine) if restore else None
    done = 0

    async def one(messages: list[dict[str, Any]], number: int) -> Sample | None:
        payload = {
            "model": model,
            "messages": messages,
            "seed": seed * 1_000_003 + number,
            "logprobs": True,
            "return_token_ids": True,
            **sampling.payload(),
        }
        try:
            return _sample_of(await gate.run(lambda: patiently(lambda: engine.chat(payload), mend)), model)
        except InvalidRequestError as error:  # of this prompt alone, such as one that leaves no room to answer
            log.warning("the engine refused a prompt: %s", error.code)
            return None

    async def group(index: int, messages: list[dict[str, Any]]) -> list[Sample]:
        nonlocal done
        numbers = range(index * num_samples, (index + 1) * num_samples)
        found = await asyncio.gather(*(one(messages, number) for number in numbers))
        done += 1
        on_done(done)
        return [sampled for sampled in found if sampled is not None]

    await gate.look(engine)
    watching = asyncio.create_task(gate.watch(engine))
    try:
        return list(await asyncio.gather(*(group(i, p) for i, p in enumerate(prompts))))
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        if gate.num_given_up:
            log.info("%d samples made room for people and were asked for again", gate.num_given_up)


async def patiently(
    ask: Callable[[], Awaitable[T]],
    mend: Callable[[], Awaitable[None]] | None = None,
    patience_s: float = PATIENCE_S,
) -> T:
    """Ask the engine, again and again while it is away, and return what came.

    Parameters
    ----------
    mend
        What to do where the engine is there and its model is not.

    Raises
    ------
    UnavailableError
        It has been away for longer than `patience_s`.
    """
    away_since_s: float | None = None
    while True:
        try:
            return await ask()
        except UnavailableError as error:
            now_s = time.monotonic()
            away_since_s = away_since_s or now_s  # not since it was asked: an answer takes long, too
            if now_s - away_since_s >= patience_s:
                raise
            log.info("the engine is away: %s", error.code)
            if mend is not None and error.code == MODEL_GONE:
                with suppress(EverloopError):  # asking again tells what came of it
                    await mend()
            await asyncio.sleep(ASK_AGAIN_S)


def _sample_of(body: dict[str, Any], model: str) -> Sample:
    (choice,) = body["choices"]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return Sample(
        text=choice["message"]["content"] or "",
        finish_reason=choice["finish_reason"],
        prompt_ids=tuple(body.get("prompt_token_ids") or ()),
        token_ids=tuple(choice.get("token_ids") or ()),
        logprobs=tuple(token["logprob"] for token in tokens),
        model=model,
    )


def sample_served(
    settings: Settings,
    config: RunConfig,
    model: str,
    prompts: Sequence[list[dict[str, Any]]],
    num_samples: int,
    seed: int,
    on_done: Callable[[int], None] = lambda done: None,
    restore: Restore | None = None,
) -> list[list[Sample]]:
    """Sample as :func:`sample` does, from the engine and in the way that settings and run name."""

    async def ask() -> list[list[Sample]]:
        async with EngineClient(
            settings.need("engine_url"), settings.engine_key, timeout_s=settings.engine_timeout_s
        ) as engine:
            return await sample(
                engine,
                model,
                prompts,
                num_samples=num_samples,
                sampling=Sampling.of(config),
                seed=config.seed + seed,
                on_done=on_done,
                restore=restore,
            )

    return asyncio.run(ask())
