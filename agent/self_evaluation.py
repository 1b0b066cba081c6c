"""After an answer, the release that gave it is asked whether it was good; its probability of Yes is kept.

Asking costs the engine about as much as the question did, so it waits until nobody else wants the engine.
It is what the model itself believes, uncalibrated: the reward worker decides what that is worth. (Kadavath et al.,
"Language Models (Mostly) Know What They Know", 2022, call it P(True).)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Self

import anyio.to_thread
from prometheus_client import Counter

from feedback import episodes, steps
from feedback.episodes import Recording
from infra.db import Sessions, transaction
from infra.errors import EverloopError
from infra.fleet import Fleet
from infra.process import in_background
from infra.settings import Settings

log = logging.getLogger("everloop.agent")

QUESTION = "Was that answer helpful, correct and well written? Reply Yes or No."
MAX_WAITING = 256
QUIET_S = 0.5  # who asks one thing after another is not done yet
PATIENCE_S = 5.0  # under load that does not end, one answer in this time is evaluated all the same
POLL_S = 0.05
# Behind others who work on the engine: a run's samples, which give way to what they take for a person.
LONG_PATIENCE_S = 60.0
LONG_POLL_S = 0.5
OUTCOMES = Counter(
    "everloop_self_evaluations",
    "Answers to be self-evaluated: recorded, dropped as too many waited, or lost to an error or to forgetting.",
    ["outcome"],
)
for _outcome in ("recorded", "dropped", "lost"):
    OUTCOMES.labels(_outcome)  # shown from the start, as 0


class SelfEvaluator:
    """Evaluates answers behind their clients' backs: one at a time, in quiet moments, none where too many wait."""

    def __init__(self, sessions: Sessions, fleet: Fleet, settings: Settings) -> None:
        self.sessions = sessions
        self.fleet = fleet
        self.enabled = settings.self_evaluation
        self._waiting: asyncio.Queue[Recording] = asyncio.Queue(MAX_WAITING)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Evaluate what is offered for the length of the block; what still waits at its end is left."""
        async with in_background(self._evaluate_all()):
            yield self

    async def offer(self, recording: Recording) -> None:
        """Take an answer whose episode is written; return at once.

        Answers that are incomplete, empty, or not to be learned from are not evaluated.
        """
        is_over = recording.status == "complete" and recording.finish_reason != "tool_calls"
        if not (self.enabled and recording.learn and recording.answer and is_over):
            return
        try:
            self._waiting.put_nowait(recording)
        except asyncio.QueueFull:
            OUTCOMES.labels("dropped").inc()

    async def _evaluate_all(self) -> None:
        while True:
            recording = await self._waiting.get()
            try:
                await self._quiet()
                recorded = await self._evaluate(recording)
            except EverloopError as error:
                log.debug("%s has no self-evaluation: %s", recording.episode_id, error.code)
                recorded = False
            except Exception as error:
                log.warning("%s has no self-evaluation: %s", recording.episode_id, type(error).__name__)
                recorded = False
            OUTCOMES.labels("recorded" if recorded else "lost").inc()

    async def _quiet(self) -> None:
        """Wait until nobody wants the engine, but not for ever: our own clients less long than others."""
        behind_clients_s = behind_others_s = 0.0
        while True:
            if self.fleet.idle_s < QUIET_S:
                if behind_clients_s >= PATIENCE_S:
                    return
                behind_clients_s += POLL_S
                await asyncio.sleep(POLL_S)
            elif behind_others_s < LONG_PATIENCE_S and await self._is_at_work():
                behind_others_s += LONG_POLL_S
                await asyncio.sleep(LONG_POLL_S)
            else:
                return

    async def _is_at_work(self) -> bool:
        """Tell whether the engine has anything to do; of one that does not tell nothing is known."""
        try:
            return await self.fleet.num_requests() > 0
        except EverloopError:
            return False

    async def _evaluate(self, recording: Recording) -> bool:
        p_good = await self.fleet.p_yes(recording.release, conversation(recording))
        return await anyio.to_thread.run_sync(self._record, recording, p_good)

    def _record(self, recording: Recording, p_good: float) -> bool:
        with transaction(self.sessions) as session:
            return episodes.record_self_evaluation(session, recording, p_good)


def conversation(recording: Recording) -> list[dict[str, Any]]:
    """Return what the release is asked: conversation, results of tools, answer, and a question about it."""
    answer = {"role": "assistant", "content": recording.answer}
    return [*steps.seen(recording.messages, recording.steps), answer, {"role": "user", "content": QUESTION}]
