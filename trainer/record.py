"""The record of a run: its row, its directory, its progress, how it ended, and the events about it."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import registry
from deploy.runs import METRICS_FILE, TrainingRun
from infra.db import DATABASE_AWAY, Sessions
from infra.errors import EverloopError
from infra.events import RunEnded, RunProgressed, TrainingUsed
from infra.log import outbox
from infra.telemetry import tracing
from infra.telemetry.tracing import Hop
from trainer.config import DEFAULT_RECIPE, RunConfig
from trainer.snapshot import Snapshot

log = logging.getLogger("everloop.night")

IDS_PER_EVENT = 500
TELL_EVERY_S = 5.0
CONFIG_FILE = "config.toml"


class RunCancelledError(EverloopError):
    """Somebody asked for the end of the run."""

    status = 409
    code = "run_cancelled"


class RunRecord:
    """A run as a page, a terminal and a restart see it.

    Parameters
    ----------
    make_sure
        Called whenever the run goes on; raises where it may not, as another process has it.

    Attributes
    ----------
    set_aside
        What the run did not use, counted by reason.
    """

    def __init__(self, sessions: Sessions, runs_dir: Path, make_sure: Callable[[], None] = lambda: None) -> None:
        self.sessions = sessions
        self.make_sure = make_sure
        self.run_id = _new_id()
        self.run_dir = runs_dir / self.run_id
        self.set_aside: Counter[str] = Counter()
        self.current_phase = ""
        self._phase_total = 0
        self._told_s = -math.inf
        self._phase_started_s = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._hop: Hop | None = None
        self._seconds: dict[str, float] = defaultdict(float)

    def create(self, config: RunConfig, flow_run_id: str | None = None) -> None:
        """Make the run's row and directory; the resolved configuration stands in both.

        Parameters
        ----------
        flow_run_id
            What the scheduler calls the run, where it started it.
        """
        with self.sessions.begin() as session:
            session.add(
                TrainingRun(
                    id=self.run_id,
                    recipe=config.recipe,
                    status="running",
                    phase="snapshot",
                    config=config.model_dump(),
                    flow_run_id=flow_run_id,
                )
            )
        self.run_dir.mkdir(parents=True)  # after the row, where a full disk can be noted
        (self.run_dir / CONFIG_FILE).write_text(config.to_toml())

    def take_over(self, run_id: str) -> None:
        """Go on with the record of a run that another process began."""
        self.run_dir = self.run_dir.with_name(run_id)
        self.run_id = run_id

    def is_cancelled(self, session: Session | None = None) -> bool:
        """Tell whether somebody asked for the end of the run; with the database away, nobody has.

        Parameters
        ----------
        session
            A transaction in which the run ends: who asks meanwhile waits, and is told that it has ended.
        """
        query = sa.select(TrainingRun.cancel_requested).where(TrainingRun.id == self.run_id)
        if session is not None:
            return bool(session.scalar(query.with_for_update()))
        try:
            with self.sessions() as own:
                return bool(own.scalar(query))
        except DATABASE_AWAY:
            return False

    def raise_if_cancelled(self, session: Session | None = None) -> None:
        """End the run where somebody asked for it.

        Raises
        ------
        RunCancelledError
        """
        if self.is_cancelled(session):
            raise RunCancelledError("The run was cancelled.")

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of `total` steps; raises as :meth:`progress` does."""
        self.make_sure()
        self.raise_if_cancelled()
        self._close_phase()
        self.current_phase = name
        self._hop = tracing.begin(f"training {name}", everloop__run_id=self.run_id)
        self._phase_total = total
        self._first = None
        self.update(phase=name, phase_done=0, phase_total=total, seconds_left=None)
        self._tell(0)

    def progress(self, done: int, total: int | None = None) -> None:
        """Note that `done` steps of the phase are behind us; a night outlives a database that blinks.

        Raises
        ------
        RunCancelledError
            Somebody asked for the end of the run.
        """
        self.make_sure()
        self.raise_if_cancelled()
        self._phase_total = total or self._phase_total
        self._first = self._first or (done, time.monotonic())
        try:
            self.update(phase_done=done, phase_total=self._phase_total, seconds_left=self._seconds_left(done))
            if time.monotonic() - self._told_s >= TELL_EVERY_S:
                self._tell(done)
        except DATABASE_AWAY:
            log.warning("progress could not be noted")

    def _seconds_left(self, done: int) -> float | None:
        """Return how long the rest of the phase takes at the pace since it was first told how far it is.

        A run that goes on from a checkpoint has not taken the steps before it now.
        """
        first_done, since_s = self._first or (0, self._phase_started_s)
        if done <= first_done:
            return None
        return round((time.monotonic() - since_s) / (done - first_done) * max(self._phase_total - done, 0), 1)

    def _tell(self, done: int) -> None:
        """Publish how far the phase is."""
        self._told_s = time.monotonic()
        event = RunProgressed(
            run_id=self.run_id,
            phase=self.current_phase,
            done=done,
            total=self._phase_total,
            seconds_left=self._seconds_left(done),
        )
        with self.sessions.begin() as session:
            outbox.append(session, event, key="deployment")

    def _close_phase(self) -> None:
        now = time.monotonic()
        self._end_hop()
        if self.current_phase:
            seconds = round(now - self._phase_started_s, 1)
            self._seconds[self.current_phase] += seconds  # some come twice
            self.metric(phase=self.current_phase, seconds=seconds)
        self._phase_started_s = now

    def _end_hop(self, error: str | None = None) -> None:
        if self._hop is not None:
            self._hop.end(error)
            self._hop = None

    def metric(self, **values: Any) -> None:
        """Append a line to the run's ``metrics.jsonl``."""
        with (self.run_dir / METRICS_FILE).open("a") as file:
            file.write(json.dumps(values) + "\n")

    def update(self, session: Session | None = None, **values: Any) -> None:
        """Change the run's row, in the transaction of `session` where there is one."""
        with nullcontext(session) if session else self.sessions.begin() as own:
            own.execute(sa.update(TrainingRun).where(TrainingRun.id == self.run_id).values(**values))

    def finish(self, status: str, session: Session | None = None, **result: Any) -> dict[str, Any]:
        """End the run, in the transaction of `session` where there is one; return what the flow reports."""
        self._close_phase()
        result |= {"seconds": dict(self._seconds), "set_aside": dict(self.set_aside)}
        with nullcontext(session) if session else self.sessions.begin() as own:
            self.end(own, status, result, phase="done")
        return {"run_id": self.run_id, "status": status, **result}

    def end(self, session: Session, status: str, result: dict[str, Any], **values: Any) -> None:
        """Write how the run ended, and its event."""
        self._end_hop(status if status in ("failed", "cancelled") else None)
        tracing.note(everloop__run_id=self.run_id, everloop__run_status=status)
        values |= {"canary_id": result["canary_id"]} if "canary_id" in result else {}
        self.update(session, status=status, result=result, ended_at=sa.func.now(), **values)
        name = session.scalar(sa.select(TrainingRun.release).where(TrainingRun.id == self.run_id))
        event = RunEnded(
            run_id=self.run_id,
            status=status,
            release=name,
            adapter_digest=registry.get_release(session, name).adapter_digest if name else None,
            reason=str(result.get("reason", "")),
            code=str(result.get("code", "")),
        )
        outbox.append(session, event, key="deployment")

    def note_inputs(self, session: Session, data: Snapshot, snapshot_id: int) -> None:
        """Write what the run is made from, down to each signal, for lineage and receipts."""
        session.execute(
            sa.update(TrainingRun)
            .where(TrainingRun.id == self.run_id)
            .values(dataset_digest=data.digest, reward_snapshot_id=snapshot_id)
        )
        tracing.note(everloop__dataset_digest=data.digest, everloop__reward_snapshot_id=snapshot_id)
        for role, examples in (("train", data.train), ("gates", data.gate)):
            ids = [feedback_id for example in examples for feedback_id in example.feedback_ids]
            if tracing.is_on():
                tracing.link(outbox.traceparents(session, ids))
            for start in range(0, len(ids), IDS_PER_EVENT):
                event = TrainingUsed(
                    run_id=self.run_id,
                    dataset_digest=data.digest,
                    reward_snapshot_id=snapshot_id,
                    role=role,
                    feedback_ids=ids[start : start + IDS_PER_EVENT],
                )
                outbox.append(session, event, key="deployment")


def note_refusal(session: Session, given: Mapping[str, Any], error: EverloopError) -> None:
    """Record a run that could not begin, as its configuration is wrong: nobody reads the scheduler's log."""
    session.add(
        TrainingRun(
            id=_new_id(),
            recipe=str(given.get("recipe", DEFAULT_RECIPE)),
            status="failed",
            phase="config",
            config=dict(given),
            result={"reason": error.message, "code": error.code},
            ended_at=sa.func.now(),
        )
    )


def _new_id() -> str:
    return f"run_{uuid.uuid4().hex[:12]}"
