"""The demo: the loop once round (or N times) with a simulated population, and the evidence for it.

Day 1 on the base model; a night; a day with the canary; promotion; a last measurement.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from deploy import canary
from deploy.gates import difference_interval
from deploy.runs import TrainingRun
from deploy.tables import Canary
from feedback.tables import Feedback, ReceiptFate, ReceiptRun, ReceiptUse
from flows import accounting
from flows.follow import run_night
from flows.simulation import Simulation, mean_words, rate_of
from infra import report
from infra.errors import ConflictError
from infra.settings import Settings

CANARY_SHARE = 0.5
RECEIPT_TRIES = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """How large the demo is."""

    nights: int
    rated_per_day: int
    max_canary_visits: int
    num_measured: int


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


class Demo:
    """The demo in progress."""

    def __init__(self, settings: Settings, simulation: Simulation, plan: Plan) -> None:
        self.settle_s = settings.canary_settle_s
        self.sessions = simulation.sessions
        self.simulation = simulation
        self.plan = plan

    async def run(self) -> Result:
        """Play the plan and return what was found."""
        started_s = time.monotonic()
        result = Result()
        people = self.simulation
        async with people:
            people.start_from_base()
            base = await people.measure(self.plan.num_measured, "before: held-out prompts")
            result.base_rate, result.base_n, result.base_ci95 = rate_of(base)
            result.base_mean_words = mean_words(base)
            await people.day(self.plan.rated_per_day, "day 1: people rate")
            for number in range(1, self.plan.nights + 1):
                result.nights.append(await self._night(number, result))
            await people.drain()
            result.receipt = await self._follow_a_thumb()
            acknowledged = people.population.acknowledged
            result.episodes, result.feedback = len(acknowledged.episodes), len(acknowledged.feedback)
            with self.sessions() as session:
                result.lost_events = accounting.lost_events(session, acknowledged)
        result.wall_s = round(time.monotonic() - started_s, 1)
        return result

    async def _night(self, number: int, before: Result) -> NightResult:
        await self.simulation.drain()
        started_s = time.monotonic()
        run = await run_night(self.sessions, {"canary_share": CANARY_SHARE})
        seconds = time.monotonic() - started_s
        decision, reason = await self._canary_day(run, number)
        measured = await self.simulation.measure(self.plan.num_measured, f"after night {number}: held-out")
        rate, n, ci95 = rate_of(measured)
        found = run.result or {}
        return NightResult(
            rate=rate,
            n=n,
            ci95=ci95,
            difference=rate - before.base_rate,
            difference_ci95=difference_interval(
                round(before.base_rate * before.base_n), before.base_n, round(rate * n), n
            ),
            seconds=round(seconds, 1),
            adapter=run.release,
            decision=decision,
            reason=reason,
            gates=found.get("gates", []),
            phase_seconds=found.get("seconds", {}),
            set_aside=found.get("set_aside", {}),
            mean_words=mean_words(measured),
        )

    async def _canary_day(self, run: TrainingRun, number: int) -> tuple[str, str]:
        """Let people meet the candidate until it is decided; return the decision and why."""
        if run.status != "canary" or run.canary_id is None:
            reason = str((run.result or {}).get("reason", ""))
            report.say(f"night {number} {run.status}: {reason}")
            return run.status, reason
        canary_id = run.canary_id
        report.say(f"{run.release} passed its gates; {CANARY_SHARE:.0%} of the users meet it")
        last_night = number == self.plan.nights
        await self.simulation.day(
            self.plan.max_canary_visits if last_night else self.plan.rated_per_day,
            f"day {number + 1}: canary",
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
            found = session.get_one(Canary, canary_id)
            return (found.decision, found.reason or "") if found.decision else None

    def _give_up(self, canary_id: int) -> tuple[str, str]:
        """End a canary that the day did not decide, as an operator would; the champion stays."""
        try:
            with self.sessions.begin() as session:
                found = session.get_one(Canary, canary_id)
                current = canary.recompute(session, found)
                reason = f"undecided at the end of the demo's day: {current.sentence()}"
                canary.close(session, found, current, "hold", actor="demo", reason=reason)
            return "hold", reason
        except ConflictError:  # the watcher decided in this moment
            return self._decision(canary_id) or ("hold", "closed by somebody else")

    async def _follow_a_thumb(self) -> dict[str, Any] | None:
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
                return await self.simulation.population.receipt(found.id, found.user_id)
            await asyncio.sleep(0.5)
        return None
