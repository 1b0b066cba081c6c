"""``/operate/live``: says what has changed, as server-sent events; a page that is concerned reads itself anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from infra.db import Sessions, transaction
from infra.errors import UnavailableError

router = APIRouter(prefix="/operate", include_in_schema=False)

LOOK_EVERY_S = 1.0
ALIVE_EVERY_S = 15.0

# One look for all topics; each is the newest id, or something as small, of what its pages show.
_STAMPS = sa.text("""
    SELECT
        (SELECT concat_ws('/', version, autonomy, (SELECT max(id) FROM audit_log),
                          (SELECT max(id) FROM proposals WHERE closed_at IS NULL))
         FROM deployment_head) AS deployment,
        (SELECT concat_ws('/', canary_id, (SELECT max(seq) FROM canary_events e WHERE e.canary_id = h.canary_id))
         FROM deployment_head h) AS canary,
        (SELECT string_agg(concat_ws('/', id, status, phase, phase_done, cancel_requested), ' ')
         FROM (SELECT * FROM training_runs ORDER BY started_at DESC LIMIT 5) newest) AS runs,
        (SELECT string_agg(concat_ws('/', url, is_up, problem), ' ' ORDER BY url) FROM replicas) AS replicas,
        (SELECT max(update_seq) FROM reward_state)::text AS reward,
        (SELECT max(seq) FROM feedback)::text AS signals,
        (SELECT max(id) FROM episodes) AS episodes
""")


def _read(sessions: Sessions) -> dict[str, str | None]:
    """Return the stamps; none where the database is away: a page goes on showing what it has."""
    try:
        with transaction(sessions) as session:
            return dict(session.execute(_STAMPS).mappings().one())
    except UnavailableError:
        return {}


async def _changes(request: Request, is_stopping: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield the topics that changed, in one event per look."""
    seen = await anyio.to_thread.run_sync(_read, request.app.state.sessions)
    silent_s = 0.0
    yield "retry: 2000\n\n"  # whoever reads the page anew now misses nothing
    while not is_stopping():
        found = await anyio.to_thread.run_sync(_read, request.app.state.sessions)
        changed = [topic for topic, stamp in found.items() if seen.get(topic, stamp) != stamp]
        seen |= found
        silent_s = 0.0 if changed else silent_s + LOOK_EVERY_S
        if changed:
            yield f"event: changed\ndata: {json.dumps(changed)}\n\n"
        elif silent_s >= ALIVE_EVERY_S:
            silent_s = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_EVERY_S)


@router.get("/live")
async def live(request: Request) -> StreamingResponse:
    """Tell of changes until the reader goes or the server stops."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    changes = _changes(request, request.app.state.is_stopping)
    return StreamingResponse(changes, media_type="text/event-stream", headers=headers)
