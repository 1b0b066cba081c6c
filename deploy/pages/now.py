"""``/operate``: the loop as it is now, who is served what and why, and what waits for somebody."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deploy import audit, autonomy, loop
from deploy.followers import Followers
from deploy.pages.rendering import Page
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

NUM_LATELY = 6


@router.get("")
def now_page(request: Request) -> Response:
    """Serve what one has to know first."""
    settings = request.app.state.settings
    followers: Followers = request.app.state.canary_followers
    with followers.lock, transaction(request.app.state.sessions) as session:
        now = loop.read(session, followers.open_rollout(session))
        context = {
            "now": now,
            "parts": loop.parts(session, settings, now),
            "decisions": loop.decisions(session, now),
            "lately": audit.newest(session, NUM_LATELY),
            "autonomy": autonomy.level(session, settings),
        }
        return Page("now.html", context).respond(request)
