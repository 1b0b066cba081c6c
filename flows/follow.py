"""Starting a night by hand, and following it to its end."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from deploy.runs import TrainingRun
from flows.nightly import NIGHTLY
from infra import report
from infra.db import Sessions
from infra.errors import EverloopError

POLL_S = 0.5
PREFECT_POLL_S = 5.0  # it knows more than the run's row only when the flow crashed, and is slow to say so
START_TIMEOUT_S = 180.0
PHASES = {"snapshot": "freezing the data", "sample": "fresh samples", "score": "scoring", "train": "training",
          "peak": "measuring checkpoints", "gates": "gates"}  # fmt: skip


async def run_night(sessions: Sessions, parameters: dict[str, Any]) -> TrainingRun:
    """Start the nightly flow through Prefect and return its run when it has ended.

    Raises
    ------
    EverloopError
        Code ``night_failed`` where the flow crashed, ``night_not_started`` where no worker took it up.
    """
    began = datetime.now(UTC)
    report.say("asking Prefect for a night run")
    by_hand = {**parameters, "by_hand": True}
    flow_run = await run_deployment(NIGHTLY, parameters=by_hand, timeout=0, as_subflow=False)
    phase: report.Phase | None = None
    try:
        async with get_client() as client:
            asked_s = time.monotonic()
            while True:
                ended = None
                if time.monotonic() - asked_s >= PREFECT_POLL_S:
                    asked_s = time.monotonic()
                    state = (await client.read_flow_run(flow_run.id)).state
                    ended = state if state is not None and state.is_final() else None
                run = _newest_run(sessions, began)
                if run is not None and run.status != "running":
                    return run
                if ended is not None:
                    raise EverloopError(
                        f"The night run ended as {ended.name}: {ended.message}. See the flow run in Prefect.",
                        code="night_failed",
                    )
                waited_s = (datetime.now(UTC) - began).total_seconds()
                if run is None and waited_s > START_TIMEOUT_S:
                    raise EverloopError(
                        "No worker took up the night run; see `everloop status` and the log of `flows`.",
                        code="night_not_started",
                    )
                if phase is None and run is not None and run.resumed_at is not None:
                    report.say(f"going on with {run.id}, which was killed; what was asked for now is left out")
                phase = _show(phase, run)
                await asyncio.sleep(POLL_S)
    finally:
        if phase is not None:
            phase.__exit__()


def _newest_run(sessions: Sessions, since: datetime) -> TrainingRun | None:
    """Return the run that was begun since, or one that was killed before and has been gone on with since."""
    taken_up = sa.func.greatest(TrainingRun.started_at, TrainingRun.resumed_at)  # which leaves out what is null
    with sessions() as session:
        return session.scalars(
            sa.select(TrainingRun).where(taken_up >= since).order_by(taken_up.desc()).limit(1)
        ).one_or_none()


def _show(phase: report.Phase | None, run: TrainingRun | None) -> report.Phase | None:
    if run is None or run.phase not in PHASES:
        return phase
    name = f"night: {PHASES[run.phase]}"
    if phase is None or phase.name != name:
        if phase is not None:
            phase.update(phase.total)
            phase.__exit__()
        phase = report.Phase(name, run.phase_total).__enter__()
    phase.update(run.phase_done, run.phase_total)
    return phase
