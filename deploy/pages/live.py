"""``/operate/live``: says what has changed, as server-sent events; a page that is concerned reads itself anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from deploy import runs
from deploy.serving import SEEN_WITHIN
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import Sessions, transaction
from infra.errors import UnavailableError

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

LOOK_EVERY_S = 1.0
ALIVE_LOOKS = 15
UNKNOWN = "?"  # what could not be read may have changed

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
        (SELECT string_agg(concat_ws('/', url, is_up, problem, seen_at > now() - CAST(:seen_within AS interval)),
                           ' ' ORDER BY url)
         FROM replicas) AS replicas,
        (SELECT concat_ws('/', max(update_seq), max(updated_at)) FROM reward_state) AS reward,
        (SELECT count(*) FROM dead_letters WHERE state = 'open')::text AS log,
        (SELECT max(seq) FROM feedback)::text AS signals,
        (SELECT max(id) FROM episodes) AS episodes
""")


def _read(sessions: Sessions) -> dict[str, str | None]:
    """Return the stamps; none where the database is away: a page goes on showing what it has."""
    try:
        with transaction(sessions) as session:
            stamps = dict(session.execute(_STAMPS, {"seen_within": SEEN_WITHIN}).mappings().one())
            return stamps | {"runs": f"{stamps['runs']} {runs.is_training(session)}"}
    except UnavailableError:
        return {}


class Pulse:
    """Looks at the stamps once a second while anybody listens, however many do."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._listeners: set[asyncio.Queue[list[str]]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._seen: dict[str, str | None] = {}

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[asyncio.Queue[list[str]]]:
        """Yield a queue of the topics that changed, after each look; what changes from now on is in it."""
        queue: asyncio.Queue[list[str]] = asyncio.Queue()
        if not self._listeners:
            self._seen = await anyio.to_thread.run_sync(_read, self.sessions)
        self._listeners.add(queue)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    async def _look(self) -> None:
        while self._listeners:
            await asyncio.sleep(LOOK_EVERY_S)
            found = await anyio.to_thread.run_sync(_read, self.sessions)
            changed = [topic for topic, stamp in found.items() if self._seen.get(topic, UNKNOWN) != stamp]
            self._seen |= found
            for queue in self._listeners:
                queue.put_nowait(changed)
        self._looking = None


async def _events(pulse: Pulse, is_stopping: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield the topics that changed, in one event per look."""
    num_silent = 0
    async with pulse.listen() as changes:
        yield "retry: 2000\nevent: ready\ndata: \n\n"  # whoever reads the page anew now misses nothing
        while not is_stopping():
            changed = await changes.get()
            num_silent = 0 if changed else num_silent + 1
            if changed:
                yield f"event: changed\ndata: {json.dumps(changed)}\n\n"
            elif num_silent % ALIVE_LOOKS == 0:
                yield ": still here\n\n"


@router.get("/live")
async def live(request: Request) -> StreamingResponse:
    """Tell of changes until the reader goes or the server stops."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    events = _events(request.app.state.pulse, request.app.state.is_stopping)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
