"""``/operate/releases``: what there is to serve, each with its lineage and evaluation, and two of them compared."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from deploy import canary, choosing, explanation, head, serving
from deploy.lineage import LineageView, lineage, releases
from deploy.pages.rendering import Page
from deploy.runs import TrainingRun
from feedback.tables import Episode
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

MAX_PROMPTS = 12
NUM_RECENT = 200
Name = Annotated[CleanText, Query(max_length=64)]


@router.get("/releases")
def releases_page(request: Request, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> Response:
    """Serve the list, the newest first."""
    with transaction(request.app.state.sessions) as session:
        found = releases(session, limit=limit)
        context = {
            "releases": found,
            "judged": _gates_passed(session, [release.name for release in found]),
            "head": head.read(session),
            "limit": limit,
        }
        return Page("releases.html", context).respond(request)


def _gates_passed(session: Session, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return how many gates each release passed, and of how many."""
    rows = session.execute(
        sa.select(TrainingRun.release, TrainingRun.result["gates"]).where(
            TrainingRun.release.in_(names), TrainingRun.result["gates"].is_not(None)
        )
    )
    return {name: (sum(gate["verdict"] == "pass" for gate in gates), len(gates)) for name, gates in rows}


@router.get("/releases/{name}")
def release_page(name: CleanText, request: Request) -> Response:
    """Serve all that is known of a release."""
    with transaction(request.app.state.sessions) as session:
        release = lineage(session, name)
        context = {
            "release": release,
            "gates": canary.gates_before(session, release.name),
            "replicas": serving.shown(session, release.name),
            "choosing": choosing.lately(session, release.name),
            "head": head.read(session),
        }
        return Page("release.html", context).respond(request)


@router.get("/compare")
def compare_page(request: Request, a: Name, b: Name) -> Response:
    """Serve two releases side by side: gates, votes where they met, and answers to the same prompts."""
    with transaction(request.app.state.sessions) as session:
        views = [lineage(session, name) for name in (a, b)]
        names = [view.name for view in views]
        gates = [{gate["gate"]: gate for gate in canary.gates_before(session, name)} for name in names]
        context = {
            "names": names,
            "gates": [(gate, *(of.get(gate) for of in gates)) for gate in dict.fromkeys([*gates[0], *gates[1]])],
            "met": _met(session, *views),
            "prompts": _prompts(session),
            "everything": [release.name for release in releases(session, limit=200)],
        }
        return Page("compare.html", context).respond(request)


def _met(session: Session, one: LineageView, other: LineageView) -> dict[str, Any] | None:
    """Return the last canary in which two releases stood against each other, told with its difference."""
    canaries = [found for found in one.canaries if other.name in (found.champion, found.challenger)]
    if not canaries or one.name == other.name:
        return None
    return explanation.explain(session, canary.get(session, canaries[-1].id))


def _prompts(session: Session) -> list[str]:
    """Return what people asked lately at the beginning of a conversation, each once."""
    recent = sa.select(Episode.messages, Episode.learn).order_by(Episode.id.desc()).limit(NUM_RECENT)
    asked = [messages[0]["content"] for messages, learn in session.execute(recent) if learn and len(messages) == 1]
    return list(dict.fromkeys(asked))[:MAX_PROMPTS]
