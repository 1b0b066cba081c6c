"""This room's part of an erasure: adapters that learned from a forgotten user are marked, or quarantined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit, head, registry
from deploy.lineage import descendants
from deploy.tables import Adapter, Canary, Release

ACTOR = f"{audit.PLATFORM}erasure"


def mark(session: Session, run_ids: Sequence[str], policy: str) -> dict[str, Any]:
    """Mark the adapters that came out of these runs, and all that were trained on from them.

    Under ``retrain-required`` they go on serving until a night has trained without the user's data; under
    ``quarantine`` none of them is served any more, and the newest clean release takes over.

    Returns
    -------
    dict
        Releases that were marked, and who serves now.
    """
    registry.lock_out_erasures(session)
    registry.lock_head(session)  # nobody promotes meanwhile what is marked here
    adapters = _with_descendants(session, run_ids)
    wanted = "quarantined" if policy == "quarantine" else "retrain-required"
    for adapter in adapters:
        if adapter.mark != "quarantined":
            adapter.mark = wanted
    session.flush()
    digests = [adapter.digest for adapter in adapters]
    releases = list(
        session.scalars(sa.select(Release.name).where(Release.adapter_digest.in_(digests)).order_by(Release.id))
    )
    if wanted == "quarantined":
        _take_out_of_service(session, set(releases))
    return {"releases_marked": releases, "mark": wanted, "champion": head.read(session).champion}


def _with_descendants(session: Session, run_ids: Sequence[str]) -> list[Adapter]:
    named = sa.select(Release.name).join(Adapter, Release.adapter_digest == Adapter.digest)
    own = session.scalars(named.where(Adapter.run_id.in_(run_ids))).all()
    names = [*own, *descendants(session, own)]
    of_them = sa.select(Release.adapter_digest).where(Release.name.in_(names))
    return list(session.scalars(sa.select(Adapter).where(Adapter.digest.in_(of_them))))


def _take_out_of_service(session: Session, releases: set[str]) -> None:
    current = head.read(session)
    reason = "it learned from a user who was forgotten"
    if current.champion in releases:
        target = registry.clean_ancestor(session, current.champion)
        head.move_champion(session, target, action="quarantined", actor=ACTOR, reason=reason)
    elif current.canary_id is not None and current.challenger in releases:
        canary = session.get_one(Canary, current.canary_id)
        head.close_canary(session, canary.id, decision="quarantined", evidence={}, actor=ACTOR, reason=reason)
