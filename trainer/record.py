"""The record of a run: its row, its directory, its progress, how it ended, and the events about it."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from deploy import registry
from infra.db import Sessions
from infra.events import RunEnded, TrainingUsed
from infra.log import outbox
from trainer.snapshot import Snapshot
from trainer.tables import TrainingRun

log = logging.getLogger("everloop.night")

IDS_PER_EVENT = 500


class RunRecord:
    """A run as a page, a terminal and a restart see it.

    Attributes
    ----------
    set_aside
        What the run did not use, counted by reason.
    """

    def __init__(self, sessions: Sessions, runs_dir: Path) -> None:
        self.sessions = sessions
        self.run_id = f"run_{uuid.uuid4().hex[:12]}"
        self.run_dir = runs_dir / self.run_id
        self.set_aside: Counter[str] = Counter()
        self._phase_started_s = time.monotonic()
        self._seconds: dict[str, float] = {}

    def create(self, recipe: str, config: dict[str, Any]) -> None:
        """Make the run's directory and row."""
        self.run_dir.mkdir(parents=True)
        with self.sessions.begin() as session:
            # Runs of a process that died hold no lock any more; they are not running.
            session.execute(
                sa.update(TrainingRun)
                .where(TrainingRun.status == "running")
                .values(status="failed", result={"reason": "the process died"}, ended_at=sa.func.now())
            )
            session.add(
                TrainingRun(
                    id=self.run_id,
                    recipe=recipe,
                    status="running",
                    phase="snapshot",
                    config=config,
                )
            )

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of `total` steps."""
        self._close_phase()
        self._current = name
        self.update(phase=name, phase_done=0, phase_total=total)

    def progress(self, done: int, total: int | None = None) -> None:
        """Note that `done` steps of the phase are behind us; a night outlives a database that blinks."""
        values = {"phase_done": done} | ({"phase_total": total} if total else {})
        try:
            self.update(**values)
        except (OperationalError, InterfaceError):
            log.warning("progress could not be noted")

    def _close_phase(self) -> None:
        now = time.monotonic()
        if hasattr(self, "_current"):
            self._seconds[self._current] = round(now - self._phase_started_s, 1)
            self.metric(phase=self._current, seconds=self._seconds[self._current])
        self._phase_started_s = now

    def metric(self, **values: Any) -> None:
        """Append a line to the run's ``metrics.jsonl``."""
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def update(self, **values: Any) -> None:
        """Change the run's row."""
        with self.sessions.begin() as session:
            session.execute(sa.update(TrainingRun).where(TrainingRun.id == self.run_id).values(**values))

    def finish(self, status: str, **result: Any) -> dict[str, Any]:
        """End the run; return what the flow reports."""
        self._close_phase()
        result |= {"seconds": self._seconds, "set_aside": dict(self.set_aside)}
        self.end(status, result, phase="done")
        return {"run_id": self.run_id, "status": status, **result}

    def end(self, status: str, result: dict[str, Any], **values: Any) -> None:
        """Write how the run ended, and its event, in one transaction."""
        with self.sessions.begin() as session:
            session.execute(
                sa.update(TrainingRun)
                .where(TrainingRun.id == self.run_id)
                .values(status=status, result=result, ended_at=sa.func.now(), **values)
            )
            name = session.scalar(sa.select(TrainingRun.release).where(TrainingRun.id == self.run_id))
            event = RunEnded(
                run_id=self.run_id,
                status=status,
                release=name,
                adapter_digest=registry.get_release(session, name).adapter_digest if name else None,
                reason=str(result.get("reason", "")),
            )
            outbox.append(session, event, key="deployment")

    def note_inputs(self, session: Session, data: Snapshot, snapshot_id: int) -> None:
        """Write what the run is made from, down to each signal, for lineage and receipts."""
        session.execute(
            sa.update(TrainingRun)
            .where(TrainingRun.id == self.run_id)
            .values(dataset_digest=data.digest, reward_snapshot_id=snapshot_id)
        )
        for role, examples in (("train", data.train), ("gates", data.gate)):
            ids = [feedback_id for example in examples for feedback_id in example.feedback_ids]
            for start in range(0, len(ids), IDS_PER_EVENT):
                event = TrainingUsed(
                    run_id=self.run_id,
                    dataset_digest=data.digest,
                    reward_snapshot_id=snapshot_id,
                    role=role,
                    feedback_ids=ids[start : start + IDS_PER_EVENT],
                )
                outbox.append(session, event, key="deployment")
