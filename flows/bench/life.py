"""One preference's life in a stack of its own: days of rating, nights of training, and what held-out prompts show.

A process plays one life, because Prefect reads its address once: ``python -m flows.bench.life PLAN``, where the
plan is a :class:`Plan` as JSON. The last line that it prints is what it found.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deploy import head
from deploy.runs import METRICS_FILE
from flows.bench.stack import own_stack
from flows.population import Judgement, read_prompts
from flows.preferences import BUILT_IN_PROMPTS
from flows.simulation import Simulation, mean_words, rate_of
from infra import report
from infra.db import Sessions
from infra.errors import EverloopError
from infra.settings import Settings
from infra.stack.cli import stop_on_sigterm
from infra.stack.parts import prefect_environment
from trainer import skills
from trainer.config import RunConfig
from trainer.prepared import ANSWERS_FILE
from trainer.rollout import sample_served
from trainer.verify import Verification

ACTOR = "bench"
SKILLS_SEED = 11


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played.

    Attributes
    ----------
    tasks_per_skill
        Tasks of each skill that base and last champion are held against each other on.
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
    tasks_per_skill: int = 0
    seed: int = 0


@dataclass(slots=True)
class Life:
    """A life in progress."""

    plan: Plan
    settings: Settings
    sessions: Sessions
    people: Simulation
    found: dict[str, Any] = field(default_factory=dict)

    async def play(self) -> dict[str, Any]:
        """Play the plan; return rates and nights."""
        base = await self.people.measure(self.plan.measured, f"{self.plan.preference}: base")
        self.found = {"base": _figures(base), "nights": []}
        before = await self._skills()
        recipes = self.plan.recipes
        await self._day(1)
        if self.plan.contest:
            for name, config in recipes.items():
                self.found["nights"].append({"name": name, **await self._try_out(config)})
            return self.found
        (config,) = recipes.values()
        for number in range(1, self.plan.nights + 1):
            if number > 1:
                await self._day(number)
            self.found["nights"].append(await self._night(config, hold=False))
        if self.plan.tasks_per_skill:
            self.found["skills"] = _compared(before, await self._skills())
        return self.found

    async def _day(self, number: int) -> None:
        await self.people.day(self.plan.rated, f"{self.plan.preference}: day {number}")
        await self.people.drain()

    async def _try_out(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Have a night, then put the base model back and leave its signals to the next one."""
        found = await self._night(config, hold=True)
        self.people.start_from_base()
        return found

    async def _skills(self) -> dict[str, list[float]]:
        """Return how right the champion's answers to tasks are, by skill."""
        if not self.plan.tasks_per_skill:
            return {}
        with self.sessions() as session:
            champion = head.read(session).champion

        def measure() -> dict[str, list[float]]:
            config = RunConfig()
            ask = partial(sample_served, self.settings, config, champion, num_samples=1, seed=SKILLS_SEED)
            with closing(Verification(config.verifiers, config.verifier_timeout_s)) as verification:
                tasks = verification.judging_tasks(self.plan.tasks_per_skill, SKILLS_SEED)
                return skills.measure(verification, tasks, ask)

        return await asyncio.to_thread(measure)

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
            run = await run_night(self.sessions, {"config": dict(config), "min_new_signals": 0})
        except EverloopError as error:
            return {"status": "failed", "reason": error.message}
        seconds = time.monotonic() - started_s
        if run.release is not None and (hold or run.status == "canary"):
            with self.sessions.begin() as session:
                head.move_champion(
                    session, run.release, action="promoted_by_hand", actor=ACTOR, reason="to be measured"
                )
        measured = await self.people.measure(self.plan.measured, f"{self.plan.preference}: after the night")
        report.say(f"{self.plan.preference}: {rate_of(measured)[0]:.1%} liked")
        result = run.result or {}
        run_dir = self.settings.runs_dir / run.id
        return {
            "peak": [
                line for line in _lines(run_dir / METRICS_FILE) if line.get("phase") == "peak" and "kl" in line
            ],
            "answers": {line["step"]: line["answers"] for line in _lines(run_dir / ANSWERS_FILE)},
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


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def _compared(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Any]:
    """Return what each skill was and is, and the change of the mean over all tasks in points."""
    mean = [statistics.fmean(score for scores in arm.values() for score in scores) for arm in (before, after)]
    return {
        "before": skills.table(before),
        "after": skills.table(after),
        "delta": 100.0 * (mean[1] - mean[0]),
    }


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
                return await Life(plan, settings, sessions, people).play()

        found = asyncio.run(live())
    report.say(f"{plan.preference}: done")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
