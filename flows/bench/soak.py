"""``everloop bench soak``: people, operators, a night, a canary and a rollback at once, for as long as is asked.

Nothing is provoked: any request that fails, any error that a part logs, and any of the acts that comes to nothing
counts. What each part holds is sampled all the while (:mod:`flows.bench.resources`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from deploy import canary, registry
from deploy.promotion import Operator
from deploy.runs import TrainingRun
from feedback.acceptance import accept
from feedback.signals import read_signal
from flows.bench.adapters import linear_shapes, write_adapter
from flows.bench.mixed_load import MixedLoad
from flows.bench.resources import Sampler
from flows.bench.stack import own_stack, write_episode
from infra import report
from infra.db import Sessions
from infra.log.outbox import lacked_by_some
from infra.settings import Settings
from infra.tables import OutboxRow

MAX_LAG_S = 10.0
LAG_TIMEOUT_S = 120.0
NIGHT_TIMEOUT_S = 600.0
NUM_TAUGHT = 40
# A night as small as one can be that does all that a night does.
NIGHT = {
    "recipe": "dpo", "batch_rows": 2, "micro_batch_rows": 2, "max_row_tokens": 64, "max_rows": 12,
    "num_gate_prompts": 8, "max_answer_tokens": 16, "gate_tasks_per_skill": 0, "checkpoints_judged": 2,
    "judge_prompts": 4, "gate_behaviour_questions": 1, "gate_timed_answers": 2,
}  # fmt: skip
ERROR_LINE = re.compile(r" (ERROR|CRITICAL) everloop|^Traceback", re.MULTILINE)
GIVEN = {"EVERLOOP_GATE_OVERRIDES": "any", "EVERLOOP_CANARY_SETTLE_S": "1"}


def measure(minutes: float) -> dict[str, Any]:
    """Run the soak.

    Returns
    -------
    dict
        ``errors`` and what they were, ``leaks`` and where, ``minutes``, ``lag_s`` (until everything was applied),
        what was ``done``, and for each part its memory, files and connections at start and end.
    """
    os.environ.update(GIVEN)
    with own_stack() as (settings, sessions, supervisor):
        acts = Acts(settings, sessions)
        acts.prepare()
        load = MixedLoad(settings)
        began_s = time.monotonic()
        with Sampler(supervisor) as sampler, load:
            _play(acts, load, began_s, 60.0 * minutes)
        lag_s = _drain(sessions)
        took_s = time.monotonic() - began_s
        logged = _logged(settings)
        parts = sampler.report()
    leaking = [f"{name}: {what}" for name, part in parts.items() for what in part["leaks"]]
    failed = [f"{failure.what}: {failure.why}" for failure in load.failures]
    errors = [*failed, *(["a connection was refused"] * len(load.refused)), *acts.problems, *logged]
    return {
        "errors": len(errors),
        "leaks": len(leaking),
        "minutes": round(took_s / 60.0, 2),
        "lag_s": round(lag_s, 2),
        "what_failed": errors[:20],
        "leaking": leaking,
        "done": dict(load.done),
        "acts": acts.done,
        "parts": parts,
    }


def _play(acts: Acts, load: MixedLoad, began_s: float, length_s: float) -> None:
    """Do each act when its time has come, and keep the load up to the end."""
    plan: list[tuple[float, str, Callable[[], None]]] = [
        (0.15, "a night", acts.night),
        (0.55, "a canary", acts.open_canary),
        (0.75, "the canary's end", acts.end_canary),
        (0.8, "a promotion", acts.promote),
        (0.9, "a rollback", acts.roll_back),
    ]
    for share, what, act in plan:
        _until(began_s + share * length_s)
        report.say(f"{what}; so far {dict(load.done)}, {len(load.failures)} failures")
        acts.try_(what, act)
    _until(began_s + length_s)


def _until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))


class Acts:
    """What operators and the scheduler do meanwhile.

    Attributes
    ----------
    done
        Seconds that each took.
    problems
        Those that came to nothing, and why.
    """

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self.settings = settings.model_copy(update={"gate_overrides": "any"})
        self.sessions = sessions
        self.operator = Operator(sessions, self.settings, "soak")
        self.done: dict[str, float] = {}
        self.problems: list[str] = []
        self._releases: list[str] = []
        self._canary_id = 0

    def prepare(self) -> None:
        """Write what a night learns from, and two releases."""
        for number in range(NUM_TAUGHT):
            user = f"teacher-{number % 4}"
            with self.sessions.begin() as session:
                episode_id = write_episode(session, user, number, f"It is {number}, I believe.")
                said = {"kind": "correction", "text": f"{number}, I hope.", "idempotency_key": f"fix-{number}"}
                accept(session, read_signal.validate_python({"episode_id": episode_id, "user": user, **said}))
        shapes = linear_shapes(self.settings.base_model_dir)
        for seed in range(2):
            directory = self.settings.home / f"soak-{seed}"
            write_adapter(directory, shapes, self.settings.max_lora_rank, seed)
            with self.sessions.begin() as session:
                found = registry.register(session, self.settings, directory, run_id=None, manifest={})
                self._releases.append(found.name)

    def try_(self, what: str, act: Callable[[], None]) -> None:
        """Do an act, and note what became of it."""
        began_s = time.monotonic()
        try:
            act()
        except Exception as error:
            self.problems.append(f"{what}: {error!r}"[:300])
        self.done[what] = round(time.monotonic() - began_s, 1)

    def night(self) -> None:
        """Have the scheduler run a night, and wait for its end; a canary that it opens is ended."""
        from infra.stack.parts import prefect_environment

        os.environ.update(prefect_environment(self.settings))  # Prefect reads its settings at import
        from flows import prefect_view

        asked = {"by_hand": True, "min_new_signals": 0, "config": NIGHT}
        flow_run = prefect_view.start(self.settings, "nightly", asked)
        until_s = time.monotonic() + NIGHT_TIMEOUT_S
        while not (state := prefect_view.state_of(flow_run))["final"]:
            if time.monotonic() > until_s:
                raise TimeoutError(f"the night has not ended: {state}")
            time.sleep(1.0)
        with self.sessions() as session:
            of_it = sa.select(TrainingRun).where(TrainingRun.flow_run_id == flow_run)
            run = session.scalars(of_it).one_or_none()
        if run is None or run.status not in ("held", "canary"):
            raise RuntimeError(f"{state}: {run.result if run else None}")
        if run.canary_id is not None:
            self._canary_id = run.canary_id
            self.end_canary()

    def open_canary(self) -> None:
        """Let half of the users meet a release."""
        self._canary_id = self.operator.try_out(self._releases[0], "a soak", share=0.5).id

    def end_canary(self) -> None:
        """End the canary, unless it has decided itself."""
        with self.operator.acting() as session:
            if canary.get(session, self._canary_id).decision is None:
                canary.abort(session, self._canary_id, actor="soak", reason="a soak")

    def promote(self) -> None:
        """Make a release the champion."""
        self.operator.promote(self._releases[1], "a soak")

    def roll_back(self) -> None:
        """Go back to the one before."""
        self.operator.roll_back(None, "a soak")


def _drain(sessions: Sessions) -> float:
    """Wait until everything is published and applied; return the seconds it took."""
    began_s = time.monotonic()
    lacking = sa.select(
        sa.exists().where(sa.or_(OutboxRow.published_at.is_(None), lacked_by_some())).select_from(OutboxRow)
    )
    while time.monotonic() - began_s < LAG_TIMEOUT_S:
        with sessions() as session:
            if not session.scalar(lacking):
                break
        time.sleep(0.05)
    return time.monotonic() - began_s


def _logged(settings: Settings) -> list[str]:
    """Return the lines in which our own parts told of an error."""
    found = []
    for path in sorted(settings.log_dir.glob("*.log")):
        if path.stem in ("engine", "prefect", "postgres", "broker"):
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{path.stem}: {line[:200]}" for line in lines if ERROR_LINE.search(line)]
    return found
