"""``/healthz`` and ``/readyz``: for whoever starts this process again, and for whoever sends it requests."""

from __future__ import annotations

import anyio
from fastapi import APIRouter, Request

from deploy import head
from infra.access.gate import needs
from infra.db import transaction
from infra.engine_wire import MODEL_GONE
from infra.errors import UnavailableError

router = APIRouter(include_in_schema=False, dependencies=[needs(None)])  # probes sign in nowhere


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Tell that the process answers; a restart would not help against anything else."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    """Tell whether a chat would be answered now.

    Raises
    ------
    UnavailableError
        Code ``stopping``, ``database_unavailable``, or ``release_loading`` where no engine that is well has proved
        the champion.
    """
    champion = await _champion(request)
    if not await request.app.state.fleet.serves(champion):
        raise UnavailableError("No engine has proved that it serves the champion.", code=MODEL_GONE)
    return {"status": "ready"}


@router.get("/readyz/feedback")
async def readyz_feedback(request: Request) -> dict[str, str]:
    """Tell whether a signal would be taken now, which needs no engine.

    Raises
    ------
    UnavailableError
        Code ``stopping`` or ``database_unavailable``.
    """
    await _champion(request)
    return {"status": "ready"}


async def _champion(request: Request) -> str:
    state = request.app.state
    if state.is_stopping():
        raise UnavailableError("This process is ending; others answer.", code="stopping")

    def read() -> str:
        with transaction(state.sessions) as session:
            return head.read(session).champion

    return await anyio.to_thread.run_sync(read)
