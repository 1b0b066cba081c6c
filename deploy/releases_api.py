"""``/v1/releases``: what there is to serve, where it comes from, and what came of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from deploy import registry, serving
from deploy.lineage import LineageView, ReleaseView, lineage, releases
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

router = APIRouter(prefix="/v1/releases", tags=["deployment"], dependencies=[needs(Role.OPERATOR)])


@router.get("")
def list_releases(
    request: Request,
    run: CleanText | None = None,
    dataset: CleanText | None = None,
    reward_snapshot: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> list[ReleaseView]:
    """Return releases, the newest first: all, or those that came of a run, a dataset or a reward snapshot."""
    with transaction(request.app.state.sessions) as session:
        return releases(session, run=run, dataset=dataset, reward_snapshot=reward_snapshot, limit=limit)


@router.get("/{name}")
def get_release(name: CleanText, request: Request) -> LineageView:
    """Return a release, by its name or as ``champion`` or ``challenger``, with its lineage in both directions."""
    with transaction(request.app.state.sessions) as session:
        return lineage(session, name)


@router.get("/{name}/replicas")
def list_replicas(name: CleanText, request: Request) -> list[serving.Shown]:
    """Return what each replica has shown of a release: whether it serves it, or why not."""
    with transaction(request.app.state.sessions) as session:
        return serving.shown(session, name)


@router.post("/{name}/load", status_code=202)
def load_release(name: CleanText, request: Request) -> list[serving.Shown]:
    """Have every replica hold a release for some minutes, to ask it something; nobody is sent to it."""
    with transaction(request.app.state.sessions) as session:
        registry.check_kept(session, name)
        serving.want(session, registry.get_release(session, name).name)
        return serving.shown(session, name)
