"""``POST /v1/feedback``."""

from __future__ import annotations

from fastapi import APIRouter, Request

from feedback import signals
from infra.db import transaction

router = APIRouter(prefix="/v1", tags=["feedback"])


@router.post("/feedback", status_code=202)
def give_feedback(signal: signals.Signal, request: Request) -> signals.Receipt:
    """Say something about an answer. The signal is safe in the log when this answers."""
    with transaction(request.app.state.sessions) as session:
        return signals.accept(session, signal)
