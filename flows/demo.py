"""The demo: the loop once round (or N times) with a simulated population, and the evidence for it.

Day 1 on the base model; a night; a day with the canary; promotion; a last measurement. Users and prompts
of the measurements are never trained on: they are other users and other prompts, and their answers are
marked as not to be learned from.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from deploy import head
from deploy.gates import wilson_interval
from deploy.tables import Canary
from deploy.votes import weigh
from feedback.tables import Feedback, ReceiptFate, ReceiptRun, ReceiptUse
from flows import accounting
from flows.follow import run_night
from flows.population import Judgement, Population, Rater
from infra import report
from infra.db import Sessions
from infra.errors import ConflictError, EverloopError
from infra.settings import BASE_MODEL_NAME, Settings
from trainer.tables import TrainingRun

HELD_OUT_PART = 0.25
NUM_USERS = 1000
CANARY_SHARE = 0.5
DRAIN_TIMEOUT_S = 180.0
RECEIPT_TRIES = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """How large the demo is."""

    nights: int
    rated_per_day: int
    max_canary_visits: int
    num_measured: int
    seed: int


@dataclass(slots=True)
class NightResult:
    """One night and what came of it."""

    rate: float
    n: int
    ci95: tuple[float, float]
    difference: float
    difference_ci95: tuple[float, float]
    seconds: float
    adapter: str | None
    decision: str
    reason: str
    gates: list[dict[str, Any]]
    phase_seconds: dict[str, float]
    set_aside: dict[str, int]
    mean_words: float


@dataclass(slots=True)
class Result:
    """All that the demo found."""

    base_rate: float = 0.0
    base_n: int = 0
    base_ci95: tuple[float, float] = (0.0, 1.0)
    base_mean_words: float = 0.0
    nights: list[NightResult] = field(default_factory=list)
    episodes: int = 0
    feedback: int = 0
    lost_events: int = 0
    receipt: dict[str, Any] | None = None
    wall_s: float = 0.0

    @property
    def closed(self) -> bool:
        """Whether the loop closed: promoted on evidence, better beyond chance, nothing lost."""
        promoted = any(night.decision == "promote" for night in self.nights)
        better = bool(self.nights) and self.nights[-1].difference_ci95[0] > 0
        return promoted and better and self.lost_events == 0


def difference_interval(good_a: int, n_a: int, good_b: int, n_b: int) -> tuple[float, float]:
    """Return the 95 % interval of rate b minus rate a (Newcombe 1998, method 10)."""
    p_a, p_b = good_a / n_a, good_b / n_b
    low_a, high_a = wilson_interval(good_a, n_a)
    low_b, high_b = wilson_interval(good_b, n_b)
    difference = p_b - p_a
    low = difference - ((p_b - low_b) ** 2 + (high_a - p_a) ** 2) ** 0.5
    high = difference + ((high_b - p_b) ** 2 + (p_a - low_a) ** 2) ** 0.5
    return low, high


class Demo:
    """The demo in progress."""

    def __init__(
        self, settings: Settings, sessions: Sessions, rater_command: str, prompts: Sequence[str], plan: Plan
    ) -> None:
        self.url = settings.need("public_url")
        self.settle_s = settings.canary_settle_s
        self.sessions = sessions
        self.rater_command = rater_command
        self.plan = plan
        # By digest, not by seed: a prompt that trained in an earlier demo on this home is never held out later.
        ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        num_held_out = max(20, int(len(ordered) * HELD_OUT_PART))
        self.held_out, self.training = ordered[:num_held_out], ordered[num_held_out:]
        self._dice = random.Random(plan.seed + 1)
        self._decks: list[str] = []

    async def run(self) -> Result:
        """Play the plan and return what was found."""
        started_s = time.monotonic()
        result = Result()
        async with (
            Population(self.url) as population,
            Rater(self.rater_command, measuring=False) as rater,
            Rater(self.rater_command, measuring=True) as measuring_rater,
        ):
            self._start_from_base()
            base = await self._measure(population, measuring_rater, "before: held-out prompts")
            result.base_n, base_good = len(base), _num_good(base)
            result.base_rate = base_good / len(base)
            result.base_ci95 = wilson_interval(base_good, len(base))
            result.base_mean_words = _mean_words(base)
            await self._day(population, rater, "day 1: people rate")
            for number in range(1, self.plan.nights + 1):
                await self._drain()
                night_started_s = time.monotonic()
                run = await run_night(self.sessions, {"canary_share": CANARY_SHARE})
                seconds = time.monotonic() - night_started_s
                decision, reason = await self._canary_day(population, rater, run, number)
                measured = await self._measure(population, measuring_rater, f"after night {number}: held-out")
                good = _num_good(measured)
                result.nights.append(
                    NightResult(
                        rate=good / len(measured),
                        n=len(measured),
                        ci95=wilson_interval(good, len(measured)),
                        difference=good / len(measured) - result.base_rate,
                        difference_ci95=difference_interval(base_good, result.base_n, good, len(measured)),
                        seconds=round(seconds, 1),
                        adapter=run.release,
                        decision=decision,
                        reason=reason,
                        gates=(run.result or {}).get("gates", []),
                        phase_seconds=(run.result or {}).get("seconds", {}),
                        set_aside=(run.result or {}).get("set_aside", {}),
                        mean_words=_mean_words(measured),
                    )
                )
            await self._drain()
            result.receipt = await self._follow_a_thumb(population)
            result.episodes = len(population.acknowledged.episodes)
            result.feedback = len(population.acknowledged.feedback)
            with self.sessions() as session:
                result.lost_events = accounting.lost_events(session, population.acknowledged)
        result.wall_s = round(time.monotonic() - started_s, 1)
        return result

    def _start_from_base(self) -> None:
        """Put the base model back, as an operator would, where an earlier demo left something else."""
        with self.sessions.begin() as session:
            current = head.read(session)
            if current.canary_id is not None or current.champion != BASE_MODEL_NAME:
                head.move_champion(
                    session,
                    BASE_MODEL_NAME,
                    action="rolled_back_by_hand",
                    actor="demo",
                    reason="a new demo starts from the base model",
                )

    async def _measure(self, population: Population, rater: Rater, title: str) -> list[Judgement]:
        """Ask the held-out prompts as users who never rate; only the measuring rater hears the answers."""
        visits = [(f"measured-{i}", prompt) for i, prompt in enumerate(self.held_out)][: self.plan.num_measured]
        with report.Phase(title, len(visits)) as phase:
            return await population.day(visits, rater, give_feedback=False, on_done=lambda _: phase.advance())

    async def _day(self, population: Population, rater: Rater, title: str) -> None:
        with report.Phase(title, self.plan.rated_per_day) as phase:
            await population.day(
                self._visits(self.plan.rated_per_day),
                rater,
                give_feedback=True,
                on_done=lambda _: phase.advance(),
            )

    async def _canary_day(
        self, population: Population, rater: Rater, run: TrainingRun, number: int
    ) -> tuple[str, str]:
        """Let people meet the candidate until it is decided; return the decision and why."""
        if run.status != "canary" or run.canary_id is None:
            reason = str((run.result or {}).get("reason", ""))
            report.say(f"night {number} {run.status}: {reason}")
            return run.status, reason
        canary_id = run.canary_id
        report.say(f"{run.release} passed its gates; {CANARY_SHARE:.0%} of the users meet it")
        last_night = number == self.plan.nights
        count = self.plan.max_canary_visits if last_night else self.plan.rated_per_day
        with report.Phase(f"day {number + 1}: canary", count) as phase:
            await population.day(
                self._visits(count),
                rater,
                give_feedback=True,
                on_done=lambda _: phase.advance(),
                stop=lambda: last_night and self._decision(canary_id) is not None,
            )
        # The last answers count once they have settled, and the watcher looks once a second.
        deadline_s = time.monotonic() + self.settle_s + 10
        while self._decision(canary_id) is None and time.monotonic() < deadline_s:
            await asyncio.sleep(0.5)
        decision = self._decision(canary_id) or self._give_up(canary_id)
        report.say(f"canary {canary_id}: {decision[0]}: {decision[1]}")
        return decision

    def _decision(self, canary_id: int) -> tuple[str, str] | None:
        with self.sessions() as session:
            canary = session.get_one(Canary, canary_id)
            return (canary.decision, canary.reason or "") if canary.decision else None

    def _give_up(self, canary_id: int) -> tuple[str, str]:
        """End a canary that the day did not decide, as an operator would; the champion stays."""
        try:
            with self.sessions.begin() as session:
                evidence = weigh(session, session.get_one(Canary, canary_id), self.settle_s)
                reason = f"undecided at the end of the demo's day: {evidence.sentence()}"
                head.close_canary(
                    session, canary_id, decision="hold", evidence=evidence.as_dict(), actor="demo", reason=reason
                )
            return "hold", reason
        except ConflictError:  # the watcher decided in this moment
            return self._decision(canary_id) or ("hold", "closed by somebody else")

    async def _follow_a_thumb(self, population: Population) -> dict[str, Any] | None:
        """Return the receipt of a vote that trained what was promoted, as the one who cast it would ask for it."""
        query = (
            sa.select(Feedback.id, Feedback.user_id)
            .join(ReceiptUse, ReceiptUse.feedback_id == Feedback.id)
            .join(ReceiptRun, ReceiptRun.run_id == ReceiptUse.run_id)
            .join(ReceiptFate, ReceiptFate.release == ReceiptRun.release)
            .where(Feedback.kind == "thumb", ReceiptUse.role == "train", ReceiptFate.fate == "promoted")
            .limit(1)
        )
        for _ in range(RECEIPT_TRIES):
            with self.sessions() as session:
                found = session.execute(query).one_or_none()
            if found is not None:
                return await population.receipt(found.id, found.user_id)
            await asyncio.sleep(0.5)
        return None

    def _visits(self, count: int) -> list[tuple[str, str]]:
        visits = []
        for _ in range(count):
            if not self._decks:
                self._decks = self._dice.sample(self.training, len(self.training))
            visits.append((f"user-{self._dice.randrange(NUM_USERS)}", self._decks.pop()))
        return visits

    async def _drain(self) -> None:
        """Wait until the reward model has applied everything."""
        with self.sessions() as session:
            waiting = accounting.backlog(session)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        with report.Phase("reward model catches up", waiting) as phase:
            while waiting:
                if time.monotonic() > deadline:
                    raise EverloopError(f"{waiting} events are still not applied.", code="reward_worker_behind")
                await asyncio.sleep(0.3)
                with self.sessions() as session:
                    waiting = accounting.backlog(session)
                phase.update(max(phase.total - waiting, 0))


def _num_good(judged: Sequence[Judgement]) -> int:
    return sum(judgement.thumb == 1 for judgement in judged)


def _mean_words(judged: Sequence[Judgement]) -> float:
    return round(sum(len(j.answer.split()) for j in judged) / max(len(judged), 1), 1)
