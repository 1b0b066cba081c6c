"""``GET /v1/deployment``: what is served to whom now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from deploy import head
from deploy.tables import Canary
from deploy.votes import weigh
from infra.db import transaction

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
