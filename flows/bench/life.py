"""One preference's life in a stack of its own: days of rating, nights of training, and what held-out prompts show.

A process plays one life, because Prefect reads its address once: ``python -m flows.bench.life PLAN``, where the
plan is a :class:`Plan` as JSON. The last line that it prints is what it found.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from deploy import head
from deploy.runs import TrainingRun
from flows.bench.stack import own_stack
from flows.population import Judgement, read_prompts
from flows.preferences import BUILT_IN_PROMPTS
from flows.simulation import Simulation, mean_words, rate_of
from infra import report
from infra.db import Sessions
from infra.errors import EverloopError
from infra.stack.cli import stop_on_sigterm
from infra.stack.parts import prefect_environment

ACTOR = "bench"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played.

    Attributes
    ----------
    recipes
        Configurations of the night, by a name of one's own. In a `contest` each trains once on the first day's
        signals, from the base model; otherwise there is one, which trains every night.
    """

    preference: str
    recipes: Mapping[str, Mapping[str, Any]]
    contest: bool = False
    nights: int = 1
    rated: int = 400
    measured: int = 180
    seed: int = 0


@dataclass(slots=True)
class Life:
    """A life in progress."""

    plan: Plan
    sessions: Sessions
    people: Simulation
    found: dict[str, Any] = field(default_factory=dict)

    async def play(self) -> dict[str, Any]:
        """Play the plan; return rates and nights."""
        base = await self.people.measure(self.plan.measured, f"{self.plan.preference}: base")
        self.found = {"base": _figures(base), "nights": []}
        await self.people.day(self.plan.rated, f"{self.plan.preference}: day 1")
        await self.people.drain()
        if self.plan.contest:
            for name, config in self.plan.recipes.items():
                self.found["nights"].append({"name": name, **await self._night(config, hold=True)})
                self.people.start_from_base()
                with self.sessions.begin() as session:  # the next one finds the day as new as this one did
                    session.execute(sa.update(TrainingRun).values(last_signal_seq=None))
            return self.found
        ((_, config),) = self.plan.recipes.items()
        for number in range(1, self.plan.nights + 1):
            self.found["nights"].append(await self._night(config, hold=False))
            if number < self.plan.nights:
                await self.people.day(self.plan.rated, f"{self.plan.preference}: day {number + 1}")
                await self.people.drain()
        return self.found

    async def _night(self, config: Mapping[str, Any], *, hold: bool) -> dict[str, Any]:
        """Train, have the candidate served to all, and measure it.

        Parameters
        ----------
        hold
            Whether a candidate that its gates held is measured too; otherwise the champion stays, as it would.
        """
        from flows.follow import run_night

        started_s = time.monotonic()
        try:
            run = await run_night(self.sessions, {"config": dict(config)})
        except EverloopError as error:
            return {"status": "failed", "reason": error.message}
        seconds = time.monotonic() - started_s
        if run.release is not None and (hold or run.status == "canary"):
            with self.sessions.begin() as session:
                head.move_champion(
                    session, run.release, action="promoted_by_hand", actor=ACTOR, reason="to be measured"
                )
        measured = await self.people.measure(self.plan.measured, f"{self.plan.preference}: after the night")
        result = run.result or {}
        return {
            **_figures(measured),
            "seconds": round(seconds, 1),
            "status": run.status,
            "reason": result.get("reason", ""),
            "phases_s": result.get("seconds", {}),
            "set_aside": result.get("set_aside", {}),
            "gates": {gate["gate"]: [gate["verdict"], round(gate["value"], 3)] for gate in result.get("gates", [])},
        }


def play(plan: Plan) -> dict[str, Any]:
    """Play a life in a process of its own; its progress goes to standard error.

    Raises
    ------
    EverloopError
        Code ``bench_failed``.
    """
    command = [sys.executable, "-m", "flows.bench.life", json.dumps(asdict(plan))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()  # it stops its stack
            raise
    if process.returncode != 0:
        raise EverloopError(f"The life of {plan.preference!r} ended with an error (above).", code="bench_failed")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _figures(judged: list[Judgement]) -> dict[str, Any]:
    rate, n, ci95 = rate_of(judged)
    return {"rate": rate, "n": n, "ci95": ci95, "mean_words": mean_words(judged)}


def main() -> None:
    """Play the plan that the one argument gives."""
    stop_on_sigterm()
    plan = Plan(**json.loads(sys.argv[1]))
    with own_stack() as (settings, sessions, _):
        os.environ.update(prefect_environment(settings))
        os.environ["EVERLOOP_RATER_SEED"] = str(plan.seed)
        rater = f"{shlex.quote(sys.executable)} -m flows.rater {plan.preference}"
        prompts = read_prompts(BUILT_IN_PROMPTS)

        async def live() -> dict[str, Any]:
            people = Simulation(settings, sessions, rater, prompts, seed=plan.seed, actor=ACTOR)
            async with people:
                return await Life(plan, sessions, people).play()

        found = asyncio.run(live())
    report.say(f"{plan.preference}: done")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
