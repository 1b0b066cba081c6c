"""Training runs as operators see them: what each was made from, how far it is, how it ended; and ending one."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, Session, mapped_column

from deploy import audit
from infra.db import Base, is_locked
from infra.errors import ConflictError, NotFoundError
from infra.tables import Timestamp

LOCK = "training"  # held by whoever trains
METRICS_FILE = "metrics.jsonl"  # in the run's directory, a line for each measurement


class TrainingRun(Base):
    """One run of a recipe."""

    __tablename__ = "training_runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    status: Mapped[str]
    phase: Mapped[str]
    phase_done: Mapped[int] = mapped_column(default=0)
    phase_total: Mapped[int] = mapped_column(default=0)
    seconds_left: Mapped[float | None]
    config: Mapped[dict[str, Any]] = mapped_column(JSONB)
    dataset_digest: Mapped[str | None]
    reward_snapshot_id: Mapped[int | None]
    release: Mapped[str | None]
    canary_id: Mapped[int | None]
    last_signal_seq: Mapped[int | None] = mapped_column(sa.BigInteger)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    cancel_requested: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    retrain_required: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    resumed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    resumes: Mapped[int] = mapped_column(default=0, server_default="0")
    flow_run_id: Mapped[str | None]
    ended_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        sa.CheckConstraint(
            "status IN ('running', 'canary', 'held', 'skipped', 'failed', 'cancelled')", name="status"
        ),
    )


def newest(session: Session, limit: int) -> list[TrainingRun]:
    """Return runs, the newest first."""
    return list(session.scalars(sa.select(TrainingRun).order_by(TrainingRun.started_at.desc()).limit(limit)))


def get(session: Session, run_id: str) -> TrainingRun:
    """Return a run.

    Raises
    ------
    NotFoundError
        Code ``run_not_found``.
    """
    run = session.get(TrainingRun, run_id)
    if run is None:
        raise NotFoundError(f"There is no run {run_id!r}.", code="run_not_found")
    return run


def metrics(runs_dir: Path, run_id: str) -> list[dict[str, Any]]:
    """Return what a run has measured so far, in its order; nothing where it trains on another host."""
    try:
        lines = (runs_dir / run_id / METRICS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written


def newest_judged(session: Session) -> TrainingRun | None:
    """Return the newest run whose release was judged by gates; None where none was."""
    has_gates = TrainingRun.result["gates"].is_not(None)
    judged = sa.select(TrainingRun).where(has_gates, TrainingRun.release.is_not(None))
    return session.scalars(judged.order_by(TrainingRun.started_at.desc()).limit(1)).first()


def is_training(session: Session) -> bool:
    """Tell whether any process trains now; a run that is recorded as running without one was stopped or killed."""
    return is_locked(session, LOCK)


def request_cancel(session: Session, run_id: str, *, actor: str, reason: str) -> None:
    """Ask a run to end; it does after its current step or answer, and nothing of it stays registered.

    Who asked, and why, goes into the audit log.

    Raises
    ------
    NotFoundError
        Code ``run_not_found``.
    ConflictError
        Code ``run_ended``.
    """
    run = session.get(TrainingRun, run_id, with_for_update=True)
    if run is None:
        raise NotFoundError(f"There is no run {run_id!r}.", code="run_not_found")
    if run.status != "running":
        raise ConflictError(f"The run has ended already: {run.status}.", code="run_ended")
    run.cancel_requested = True
    audit.write(session, actor=actor, action="run_cancelled", subject=run_id, reason=reason)


def request_cancel_of_flow(session: Session, flow_run_id: str) -> TrainingRun | None:
    """Ask the run of a flow that was cancelled in Prefect to end, once; return it, if there is one under way."""
    running = sa.select(TrainingRun).where(TrainingRun.flow_run_id == flow_run_id, TrainingRun.status == "running")
    run = session.scalars(running.with_for_update()).one_or_none()
    if run is not None and not run.cancel_requested:
        run.cancel_requested = True
        reason = "its flow was cancelled there"
        audit.write(session, actor="prefect", action="run_cancelled", subject=run.id, reason=reason)
    return run
