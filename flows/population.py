"""A simulated population: chats and rates through the public HTTP API, and through nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI

from infra.errors import SetupError
from infra.settings import Settings

CONCURRENT_USERS = 24
MAX_ANSWER_TOKENS = 96
TRIES = 5


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer, and what the rater said of it."""

    episode_id: str
    user_id: str
    release: str
    answer: str
    thumb: int


@dataclass(slots=True)
class Acknowledged:
    """The client's own list of what the platform said it had."""

    episodes: list[str] = field(default_factory=list)
    learnable: list[str] = field(default_factory=list)
    feedback: list[str] = field(default_factory=list)


class Rater:
    """A rater program, spoken to in JSON lines.

    Parameters
    ----------
    command
        Shell words of the program.
    measuring
        Tells the program, through ``EVERLOOP_MEASURING=1``, that nobody learns from these votes, so that
        a rater that errs on purpose need not.
    """

    def __init__(self, command: str, *, measuring: bool) -> None:
        self.command = command
        self.measuring = measuring
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Rater:
        environment = {**os.environ, "EVERLOOP_MEASURING": "1" if self.measuring else "0"}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *shlex.split(self.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                limit=1 << 20,
            )
        except OSError as error:
            raise SetupError(
                f"The rater {self.command!r} cannot be started: {error}", code="rater_failed"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()

    async def rate(self, request: dict[str, Any]) -> tuple[int, str | None]:
        """Return (thumb, correction) for one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        async with self._turn:
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
            except (OSError, ValueError) as error:  # it died, or its line is over the limit
                raise SetupError(f"The rater stopped answering: {error}", code="rater_failed") from error
        try:
            reply = json.loads(line)
            thumb, correction = reply["thumb"], reply.get("correction")
            if thumb not in (-1, 0, 1) or not (correction is None or isinstance(correction, str)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(
                f'The rater answered {line[:200]!r}; expected {{"thumb": -1|0|1, "correction": null|"..."}}.',
                code="rater_failed",
            ) from error
        return int(thumb), correction


class Population:
    """Users who talk to the assistant.

    Parameters
    ----------
    settings
        Where the API is, and by which key it knows us; that key may act for others.
    """

    def __init__(self, settings: Settings) -> None:
        url, key = settings.need("public_url"), settings.service_key or "unused"
        self.acknowledged = Acknowledged()
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=300, max_retries=TRIES)
        self._http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, headers=settings.credentials)

    async def __aenter__(self) -> Population:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()
        await self._http.aclose()

    async def day(
        self,
        visits: Sequence[tuple[str, str]],
        rater: Rater,
        *,
        give_feedback: bool,
        on_done: Callable[[Judgement], None] = lambda judgement: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Judgement]:
        """Let each (user, prompt) of `visits` chat once and rate the answer.

        Parameters
        ----------
        give_feedback
            False for measuring: the rater's votes stay here, and the answers are not learned from.
        stop
            Asked before each visit; the rest of the day is left out once it is true.
        """
        gate = asyncio.Semaphore(CONCURRENT_USERS)
        judged: list[Judgement] = []

        async def visit(user: str, prompt: str) -> None:
            async with gate:
                if stop():
                    return
                judgement, correction = await self._chat(user, prompt, rater, learn=give_feedback)
                if give_feedback:
                    if judgement.thumb:
                        await self._give(judgement, {"kind": "thumb", "value": judgement.thumb})
                    if correction:
                        await self._give(judgement, {"kind": "correction", "text": correction})
            judged.append(judgement)
            on_done(judgement)

        async with asyncio.TaskGroup() as tasks:
            for user, prompt in visits:
                tasks.create_task(visit(user, prompt))
        return judged

    async def _chat(self, user: str, prompt: str, rater: Rater, *, learn: bool) -> tuple[Judgement, str | None]:
        messages = [{"role": "user", "content": prompt}]
        completion = await self._with_retries(messages, user, learn)
        answer = completion.choices[0].message.content or ""
        self.acknowledged.episodes.append(completion.id)
        if learn and answer:
            self.acknowledged.learnable.append(completion.id)
        thumb, correction = await rater.rate(
            {"episode_id": completion.id, "user_id": user, "messages": messages, "answer": answer}
        )
        return Judgement(completion.id, user, completion.model, answer, thumb), correction

    async def _with_retries(self, messages: list[dict[str, str]], user: str, learn: bool) -> Any:
        for attempt in range(TRIES):
            try:
                return await self._openai.chat.completions.create(
                    model="everloop",
                    messages=messages,  # type: ignore[arg-type]
                    user=user,
                    store=learn,
                    max_tokens=MAX_ANSWER_TOKENS,
                )
            except APIError:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(2.0)
        raise AssertionError

    async def receipt(self, feedback_id: str, user: str) -> dict[str, Any]:
        """Return what became of a user's signal."""
        response = await self._http.get(f"/v1/feedback/{feedback_id}/receipt", headers={"X-Everloop-User": user})
        response.raise_for_status()
        return dict(response.json())

    async def _give(self, judgement: Judgement, signal: dict[str, Any]) -> None:
        body = {
            "episode_id": judgement.episode_id,
            "user": judgement.user_id,
            "idempotency_key": uuid.uuid4().hex,
            **signal,
        }
        for attempt in range(TRIES):
            try:
                response = await self._http.post("/v1/feedback", json=body)
                response.raise_for_status()
                self.acknowledged.feedback.append(response.json()["id"])
                return
            except httpx.HTTPError:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(1.0)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one per line, as text or as JSON (``{"prompt": …}`` or a string).

    Raises
    ------
    SetupError
        Code ``prompts_unreadable`` or ``prompts_too_few``.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        prompts = [_prompt_of(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path} cannot be read as prompts: {error}", code="prompts_unreadable") from error
    unique = list(dict.fromkeys(prompts))
    if len(unique) < 40:
        raise SetupError(
            f"{path} has {len(unique)} distinct prompts; at least 40 are needed.", code="prompts_too_few"
        )
    return unique


def _prompt_of(line: str) -> str:
    if not line.startswith(("{", '"')):
        return line
    value = json.loads(line)
    return str(value["prompt"] if isinstance(value, dict) else value)
