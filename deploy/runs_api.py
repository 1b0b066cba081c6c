"""``/v1/runs``: what is trained, and ending it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from deploy import runs
from deploy.api import ByOperator, Reasoned
from deploy.runs import TrainingRun
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction

router = APIRouter(prefix="/v1", tags=["deployment"], dependencies=[needs(Role.OPERATOR)])


class RunView(BaseModel):
    """A training run."""

    id: str
    recipe: str
    status: str
    phase: str
    phase_done: int
    phase_total: int
    seconds_left: float | None
    release: str | None
    reason: str
    code: str
    cancel_requested: bool
    is_stopped: bool = Field(description="Whether nobody works on a running run: the next one goes on with it.")
    started_at: datetime
    ended_at: datetime | None

    @classmethod
    def of(cls, run: TrainingRun, is_training: bool) -> RunView:
        """Return a run as it is shown."""
        result = run.result or {}
        told: dict[str, Any] = {name: str(result.get(name, "")) for name in ("reason", "code")}
        told["is_stopped"] = run.status == "running" and not is_training
        return cls(**told, **{name: getattr(run, name) for name in cls.model_fields if name not in told})


@router.get("/runs")
def list_runs(request: Request, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> list[RunView]:
    """Return training runs, the newest first."""
    with transaction(request.app.state.sessions) as session:
        is_training = runs.is_training(session)
        return [RunView.of(run, is_training) for run in runs.newest(session, limit)]


@router.post("/runs/{run_id}/cancel", status_code=202)
def cancel_run(run_id: str, body: Reasoned, who: ByOperator, request: Request) -> RunView:
    """Ask a run to end: it does after its current step or answer, and nothing of it stays registered."""
    with who.acting() as session:
        runs.request_cancel(session, run_id, actor=who.name, reason=body.reason)
        return RunView.of(session.get_one(TrainingRun, run_id), runs.is_training(session))
