"""``/v1/deployment``: what is served to whom now; ``/v1/runs``: what is trained, and ending it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from deploy import head, runs
from deploy.runs import TrainingRun
from deploy.tables import Canary
from deploy.votes import weigh
from infra.db import transaction

ACTOR = "operator"
STATIC_DIR = Path(__file__).parent / "static"
pages = APIRouter()
router = APIRouter(prefix="/v1", tags=["deployment"])


class DeploymentView(BaseModel):
    """The head, and the evidence of the open canary."""

    version: int
    champion: str
    challenger: str | None
    share: float
    canary_id: int | None
    evidence: dict[str, Any] | None


@router.get("/deployment")
def get_deployment(request: Request) -> DeploymentView:
    """Return the deployment head."""
    settle_s = request.app.state.settings.canary_settle_s
    with transaction(request.app.state.sessions) as session:
        current = head.read(session)
        canary = session.get(Canary, current.canary_id) if current.canary_id else None
        return DeploymentView(
            version=current.version,
            champion=current.champion,
            challenger=current.challenger,
            share=current.share,
            canary_id=current.canary_id,
            evidence=weigh(session, canary, settle_s).as_dict() if canary else None,
        )


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


class CancelRequest(BaseModel):
    """Why a run is to end."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=1, max_length=500)


@pages.get("/runs", include_in_schema=False)
def runs_page() -> FileResponse:
    """Serve the page of training runs."""
    return FileResponse(STATIC_DIR / "runs.html")


@router.get("/runs")
def list_runs(request: Request, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> list[RunView]:
    """Return training runs, the newest first."""
    with transaction(request.app.state.sessions) as session:
        is_training = runs.is_training(session)
        return [RunView.of(run, is_training) for run in runs.newest(session, limit)]


@router.post("/runs/{run_id}/cancel", status_code=202)
def cancel_run(run_id: str, body: CancelRequest, request: Request) -> RunView:
    """Ask a run to end: it does after its current step or answer, and nothing of it stays registered."""
    with transaction(request.app.state.sessions) as session:
        runs.request_cancel(session, run_id, actor=ACTOR, reason=body.reason)
        return RunView.of(session.get_one(TrainingRun, run_id), runs.is_training(session))
