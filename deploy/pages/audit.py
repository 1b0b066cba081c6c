"""``/operate/audit``: who did what, when, from where and why; and whether the chain holds."""

from __future__ import annotations

from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from deploy import audit
from deploy.pages.rendering import Chart, Page, Series
from feedback.tables import User
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

PAGE_ROWS = 50
CSV_ROWS = 10_000


@router.get("/audit")
def audit_page(
    request: Request,
    before_id: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
    by: str = "",
    about: CleanText = "",
    csv: str | None = None,
) -> Response:
    """Serve the log, the newest first; by ``people`` or the ``platform``, about a release or run."""
    automatic = {"people": False, "platform": True}.get(by)
    limit = CSV_ROWS if csv else PAGE_ROWS + 1
    with transaction(request.app.state.sessions) as session:
        person = session.get(User, about) if about else None
        subject = person.key_id if person else about or None
        found = audit.newest(session, limit, before_id=before_id, automatic=automatic, subject=subject)
        keys = sa.select(User.key_id, User.user_id).where(User.key_id.in_({e.subject for e in found}))
        people = dict(session.execute(keys).tuples().all())
    entries, has_more = found[:PAGE_ROWS], len(found) > PAGE_ROWS
    context = {
        "entries": entries,
        "people": people,  # the log names them by their keys, which say nothing once they are forgotten
        "by": by,
        "about": about,
        "before_id": before_id,
        "next_before": entries[-1].id if has_more and entries else None,
        "platform": audit.PLATFORM,
    }
    rows = [(e.created_at, e.id, e.actor, e.action, e.subject, e.reason, e.address, e.hash) for e in found]
    columns = [Series(name) for name in ("entry", "actor", "action", "subject", "reason", "address", "hash")]
    log = Chart("audit", "Audit log", "Who did what.", "when", columns, rows)
    return Page("audit.html", context, [log]).respond(request, csv)
