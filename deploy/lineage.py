"""Where a release comes from, and what came of it: runs, data, reward, ancestors and descendants."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple, Self

import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from deploy import head
from deploy.names import CHALLENGER, CHAMPION
from deploy.registry import ancestors, get_release
from deploy.runs import TrainingRun
from deploy.tables import Adapter, Canary, Release
from infra.settings import BASE_MODEL_NAME


class ReleaseView(BaseModel):
    """A release as it is listed."""

    name: str
    alias: str | None = Field(description="champion or challenger, where it is one now.")
    digest: str | None = Field(description="SHA-256 of its adapter; null for the base model.")
    base_digest: str | None = Field(description="SHA-256 of the base model that it was trained on.")
    run: str | None = Field(description="The run that trained it; null where it was imported.")
    dataset_digest: str | None
    reward_snapshot: int | None
    variant_of: str | None = Field(description="The release whose weights it has, where it only answers otherwise.")
    decoding: dict[str, int] | None = Field(description="How it answers, where that is part of what it is.")
    started_from: str | None = Field(description="The release that it goes on from.")
    was_champion: bool = Field(description="Whether it has been champion before, so that one can go back to it.")
    mark: str | None = Field(description="retrain-required or quarantined: it learned from somebody forgotten.")
    created_at: datetime
    files_deleted_at: datetime | None = Field(description="Since when its files are gone; its history stays.")


class CanaryView(BaseModel):
    """A canary that a release took part in."""

    id: int
    champion: str
    challenger: str
    decision: str | None = Field(description="null while it is open.")
    opened_at: datetime
    closed_at: datetime | None


class LineageView(ReleaseView):
    """A release with all that it came from and all that came of it."""

    ancestors: list[str] = Field(description="The nearest first, down to the base model.")
    descendants: list[str] = Field(description="Releases that go on from it, the oldest first.")
    canaries: list[CanaryView]
    recipe: str | None
    run_status: str | None
    files: dict[str, str] = Field(description="SHA-256 of each file.")
    num_signals: int | None
    num_rows: int | None


def releases(
    session: Session,
    *,
    run: str | None = None,
    dataset: str | None = None,
    reward_snapshot: int | None = None,
    limit: int = 100,
) -> list[ReleaseView]:
    """Return releases, the newest first; those that came of a run, a dataset or a reward snapshot, if one is given.

    Parameters
    ----------
    dataset
        The digest of a dataset, or how it begins.
    """
    query = sa.select(Release, Adapter).outerjoin(Adapter, Release.adapter_digest == Adapter.digest)
    if run is not None:
        query = query.where(Adapter.run_id == run)
    if dataset is not None:
        query = query.where(Adapter.manifest["dataset_digest"].astext.startswith(dataset, autoescape=True))
    if reward_snapshot is not None:
        query = query.where(Adapter.manifest["reward_snapshot_id"].astext == str(reward_snapshot))
    rows = session.execute(query.order_by(Release.id.desc()).limit(limit))
    now = _Now.of(session)
    return [ReleaseView(**_fields(release, adapter, now)) for release, adapter in rows]


def lineage(session: Session, name: str) -> LineageView:
    """Return a release with its lineage in both directions.

    Raises
    ------
    NotFoundError
        Code ``release_not_found``.
    """
    release = get_release(session, name)
    adapter = session.get(Adapter, release.adapter_digest) if release.adapter_digest else None
    manifest = adapter.manifest if adapter else {}
    run = session.get(TrainingRun, adapter.run_id) if adapter and adapter.run_id else None
    met = sa.or_(Canary.champion == release.name, Canary.challenger == release.name)
    canaries = session.scalars(sa.select(Canary).where(met).order_by(Canary.id))
    return LineageView(
        **_fields(release, adapter, _Now.of(session)),
        ancestors=ancestors(session, release.name),
        descendants=descendants(session, [release.name]),
        canaries=[CanaryView.model_validate(canary, from_attributes=True) for canary in canaries],
        recipe=run.recipe if run else manifest.get("recipe"),
        run_status=run.status if run else None,
        files=manifest.get("files", {}),
        num_signals=manifest.get("num_signals"),
        num_rows=manifest.get("num_rows"),
    )


def descendants(session: Session, names: Iterable[str]) -> list[str]:
    """Return the releases that go on from any of `names`, by whatever way, the oldest first."""
    started_from = sa.func.coalesce(Adapter.manifest["started_from"].astext, BASE_MODEL_NAME)
    children = sa.select(Release.id, Release.name, started_from.label("parent")).join(
        Adapter, Release.adapter_digest == Adapter.digest
    )
    edges = children.cte("edges")
    line = sa.select(edges.c.id, edges.c.name).where(edges.c.parent.in_(list(names))).cte("line", recursive=True)
    line = line.union(sa.select(edges.c.id, edges.c.name).join(line, edges.c.parent == line.c.name))
    return list(session.scalars(sa.select(line.c.name).order_by(line.c.id)))


class _Now(NamedTuple):
    aliases: dict[str | None, str]
    former_champions: set[str]

    @classmethod
    def of(cls, session: Session) -> Self:
        current = head.read(session)
        aliases = {current.challenger: CHALLENGER, current.champion: CHAMPION}
        return cls(aliases, head.former_champions(session))


def _fields(release: Release, adapter: Adapter | None, now: _Now) -> dict[str, Any]:
    manifest = adapter.manifest if adapter else {}
    return {
        "name": release.name,
        "alias": now.aliases.get(release.name),
        "digest": release.adapter_digest,
        "base_digest": adapter.base_digest if adapter else None,
        "run": adapter.run_id if adapter else None,
        "variant_of": release.variant_of,
        "decoding": release.decoding,
        "dataset_digest": manifest.get("dataset_digest"),
        "reward_snapshot": manifest.get("reward_snapshot_id"),
        "started_from": manifest.get("started_from", BASE_MODEL_NAME) if adapter else None,
        "was_champion": release.name in now.former_champions,
        "mark": adapter.mark if adapter else None,
        "created_at": release.created_at,
        "files_deleted_at": adapter.files_deleted_at if adapter else None,
    }
