"""A deployment with simulated people: their days, and what they make of held-out prompts.

Users and prompts of the measurements are never trained on: they are other users and other prompts, and their
answers are marked as not to be learned from.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from deploy import head
from deploy.gates import wilson_interval
from flows import accounting
from flows.population import Judgement, Population, Rater
from infra import report
from infra.db import Sessions
from infra.errors import EverloopError
from infra.settings import BASE_MODEL_NAME, Settings

HELD_OUT_PART = 0.25
NUM_USERS = 1000
DRAIN_TIMEOUT_S = 180.0


class Simulation:
    """People with one preference, who talk to a running stack through its public API.

    Parameters
    ----------
    rater_command
        Shell words of the program that rates.
    prompts
        What people ask; a quarter, chosen by digest, is held out for measuring.
    actor
        Who the audit log says moved the head.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        rater_command: str,
        prompts: Sequence[str],
        *,
        seed: int,
        actor: str,
    ) -> None:
        self.sessions = sessions
        self.actor = actor
        self.population = Population(settings)
        self._rater = Rater(rater_command, measuring=False)
        self._measuring_rater = Rater(rater_command, measuring=True)
        # By digest, not by seed: a prompt that trained in an earlier run on this home is never held out later.
        ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        num_held_out = max(20, int(len(ordered) * HELD_OUT_PART))
        self.held_out, self.training = ordered[:num_held_out], ordered[num_held_out:]
        self._dice = random.Random(seed + 1)
        self._decks: list[str] = []
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for part in (self.population, self._rater, self._measuring_rater):
            await self._open.enter_async_context(part)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.__aexit__(kind, error, trace)

    def start_from_base(self) -> None:
        """Put the base model back, as an operator would, where something else is served."""
        with self.sessions.begin() as session:
            current = head.read(session)
            if current.canary_id is not None or current.champion != BASE_MODEL_NAME:
                head.move_champion(
                    session,
                    BASE_MODEL_NAME,
                    action="rolled_back_by_hand",
                    actor=self.actor,
                    reason="starts from the base model",
                )

    async def measure(self, num_answers: int, title: str) -> list[Judgement]:
        """Ask the held-out prompts in turn as users who never rate; only the measuring rater hears the answers."""
        visits = [(f"measured-{n}", self.held_out[n % len(self.held_out)]) for n in range(num_answers)]
        with report.Phase(title, num_answers) as phase:
            return await self.population.day(
                visits, self._measuring_rater, give_feedback=False, on_done=lambda _: phase.advance()
            )

    async def day(self, num_visits: int, title: str, stop: Callable[[], bool] = lambda: False) -> list[Judgement]:
        """Let people chat and rate."""
        with report.Phase(title, num_visits) as phase:
            return await self.population.day(
                self._visits(num_visits),
                self._rater,
                give_feedback=True,
                on_done=lambda _: phase.advance(),
                stop=stop,
            )

    async def drain(self) -> None:
        """Wait until the reward model has applied everything."""
        with self.sessions() as session:
            waiting = accounting.backlog(session)
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        with report.Phase("reward model catches up", waiting) as phase:
            while waiting:
                if time.monotonic() > deadline_s:
                    raise EverloopError(f"{waiting} events are still not applied.", code="reward_worker_behind")
                await asyncio.sleep(0.3)
                with self.sessions() as session:
                    waiting = accounting.backlog(session)
                phase.update(max(phase.total - waiting, 0))

    def _visits(self, count: int) -> list[tuple[str, str]]:
        visits = []
        for _ in range(count):
            if not self._decks:
                self._decks = self._dice.sample(self.training, len(self.training))
            visits.append((f"user-{self._dice.randrange(NUM_USERS)}", self._decks.pop()))
        return visits


def rate_of(judged: Sequence[Judgement]) -> tuple[float, int, tuple[float, float]]:
    """Return the share of liked answers, the number of answers, and its 95 % interval."""
    good = sum(judgement.thumb == 1 for judgement in judged)
    return good / len(judged), len(judged), wilson_interval(good, len(judged))


def mean_words(judged: Sequence[Judgement]) -> float:
    """Return the mean length of answers in words."""
    return round(sum(len(j.answer.split()) for j in judged) / max(len(judged), 1), 1)
