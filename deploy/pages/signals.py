"""``/operate/feedback``: what people said; searched, read in context, judged; raters and bursts; export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from deploy import signals
from deploy.pages.rendering import Page
from deploy.signals import Found, Wanted
from feedback.acceptance import COLUMNS
from feedback.signals import KINDS
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import Sessions, transaction
from infra.errors import EverloopError
from infra.text import CleanText
from reward import report

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

PAGE_ROWS = 50
EXPORT_ROWS = 1000
NUM_RATERS = 20
STATUSES = ("accepted", "learned", "set_aside")
Text = Annotated[CleanText, Query(max_length=200)]


def wanted(words: Text = "", kind: Text = "", user: Text = "", status: Text = "", reason: Text = "") -> Wanted:
    """Return what the query asks for."""
    return Wanted(words.strip(), kind, user.strip(), status if status in STATUSES else "", reason)


Asked = Annotated[Wanted, Depends(wanted)]


@router.get("/feedback")
def feedback_page(request: Request, asked: Asked, before: Text = "") -> Response:
    """Serve the search, the newest signals first."""
    with transaction(request.app.state.sessions) as session:
        quarantines, raters = report.list_quarantines(session), report.list_raters(session, NUM_RATERS)
        found = signals.search(session, replace(asked, before=before or None), PAGE_ROWS + 1)
    context = {
        "found": found[:PAGE_ROWS],
        "next_before": found[PAGE_ROWS - 1].signal.id if len(found) > PAGE_ROWS else None,
        "asked": asked,
        "query": urlencode({name: value for name, value in asdict(asked).items() if value}),
        "kinds": KINDS,
        "statuses": STATUSES,
        "quarantines": quarantines,
        "raters": raters,
    }
    return Page("signals.html", context).respond(request)


@router.get("/feedback/export.jsonl")
def export(request: Request, asked: Asked) -> StreamingResponse:
    """Stream all that a search finds, a line each."""
    headers = {"Content-Disposition": 'attachment; filename="everloop-feedback.jsonl"'}
    sessions = request.app.state.sessions
    lines = _lines(sessions, asked, _page(sessions, asked))  # what is too wide is refused before anything is sent
    return StreamingResponse(lines, media_type="application/x-ndjson", headers=headers)


def _page(sessions: Sessions, asked: Wanted) -> list[Found]:
    with transaction(sessions) as session:
        return signals.search(session, asked, EXPORT_ROWS)


def _lines(sessions: Sessions, asked: Wanted, found: list[Found]) -> Iterator[str]:
    """Yield lines page by page, so that neither memory nor a transaction grows with them."""
    while found:
        for row in found:
            yield json.dumps(_line(row), ensure_ascii=False) + "\n"
        if len(found) < EXPORT_ROWS:
            return
        try:
            found = _page(sessions, replace(asked, before=found[-1].signal.id))
        except EverloopError as error:  # too late for another status
            yield json.dumps(error.envelope()) + "\n"
            return


def _line(found: Found) -> dict[str, Any]:
    signal = found.signal
    said = {name: getattr(signal, name) for name in COLUMNS if getattr(signal, name) is not None}
    return {
        "id": signal.id,
        "given_at": (signal.given_at or signal.created_at).isoformat(),
        "user": signal.user_id,
        "episode_id": signal.episode_id,
        "release": found.release,
        "kind": signal.kind,
        **said,
        "status": found.status,
        "reason": found.reason,
    }


@router.get("/feedback/{episode_id}")
def context_page(episode_id: CleanText, request: Request) -> Response:
    """Serve an answer in its context, with all that was said of it."""
    with transaction(request.app.state.sessions) as session:
        return Page("signal.html", {"it": signals.in_context(session, episode_id)}).respond(request)
