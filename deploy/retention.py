"""Which adapters' files may go: those that nothing serves, tries, trains on, rolls back to or goes on from.

Rows stay, for history and lineage; only files go. What may go is decided under the head's lock, written, and only
then deleted: a crash in between leaves files that the next round removes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit
from deploy.head import champion_after, champion_before, previous_champion
from deploy.registry import lock_head, lock_out_erasures
from deploy.runs import TrainingRun
from deploy.store import open_store
from deploy.tables import Adapter, AuditEntry, Canary, Head, Release
from deploy.variants import all_variants
from infra.db import Sessions
from infra.errors import ConflictError
from infra.settings import BASE_MODEL_NAME, Settings

log = logging.getLogger("everloop.retention")

ACTOR = f"{audit.PLATFORM}retention"
LEFTOVERS_AGE_S = 86_400.0
Move = tuple[str, str]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter, as far as its retention goes.

    Attributes
    ----------
    started_from
        The release whose adapter it was trained on from.
    stored_at
        When its files came into the store.
    has_files
        Whether they are still there.
    """

    digest: str
    release: str
    started_from: str
    stored_at: datetime
    has_files: bool = True


@dataclass(slots=True)
class Pruned:
    """What a round did, or would do.

    Attributes
    ----------
    releases
        Whose files were found to be needed by nothing.
    num_deleted
        Adapters whose files were removed, those that an earlier round had not come to included.
    num_leftovers
        Half-written adapters that were removed.
    orphans
        Digests of whole adapters that no row names: left by a registration that came to nothing, or another
        database's. They are told, and left alone.
    """

    releases: list[str] = field(default_factory=list)
    num_deleted: int = 0
    num_leftovers: int = 0
    orphans: list[str] = field(default_factory=list)


def deletable(
    adapters: Sequence[StoredAdapter],
    in_use: Collection[str],
    moves: Sequence[Move],
    *,
    num_moves_kept: int,
    young_since: datetime,
) -> list[StoredAdapter]:
    """Return the adapters whose files nothing needs.

    Parameters
    ----------
    adapters
        All of them, those without files too: lineage goes through them.
    in_use
        Releases that are served, tried by users or used by a run in progress.
    moves
        Who was champion before and after each change of it, the newest first.
    num_moves_kept
        So many of the newest moves can be rolled back.
    young_since
        What was stored since then stays.
    """
    by_release = {adapter.release: adapter for adapter in adapters}
    kept = set(in_use)
    kept.update(name for move in moves[:num_moves_kept] for name in move)
    kept.update(adapter.release for adapter in adapters if adapter.stored_at >= young_since)
    # What a kept one goes on from is what serves when it must not any more (an erasure): all the way down.
    waiting = list(kept)
    while waiting:
        adapter = by_release.get(waiting.pop())
        if adapter is not None and adapter.started_from not in kept:
            kept.add(adapter.started_from)
            waiting.append(adapter.started_from)
    return [adapter for adapter in adapters if adapter.has_files and adapter.release not in kept]


def prune(sessions: Sessions, settings: Settings, *, dry_run: bool = False, actor: str = ACTOR) -> Pruned:
    """Delete the files of adapters that nothing needs, and what crashes left half-written.

    Parameters
    ----------
    dry_run
        Only tell what would go.
    actor
        Who does it, for the audit log.

    Raises
    ------
    UnavailableError
        Code ``adapter_store_unavailable``; the next round goes on.
    """
    found = Pruned()
    with sessions.begin() as session:
        lock_out_erasures(session)  # before the head's, as everywhere
        lock_head(session)
        going = _deletable_now(session, settings)
        found.releases = [adapter.release for adapter in going]
        if not dry_run:
            _mark(session, going, actor)
    _delete_files(sessions, settings, found, dry_run)
    if found.releases and not dry_run:
        log.info("deleted the files of %s", ", ".join(found.releases))
    return found


def _deletable_now(session: Session, settings: Settings) -> list[StoredAdapter]:
    named = sa.select(Adapter, Release.name).join(Release, Release.adapter_digest == Adapter.digest)
    rows = session.execute(named.where(Release.variant_of.is_(None)).order_by(Release.id))
    of = all_variants(session)  # what a variant needs are the files of the release whose weights it has
    adapters = [
        StoredAdapter(
            adapter.digest,
            name,
            _held_for(of, str(adapter.manifest.get("started_from", BASE_MODEL_NAME))),
            adapter.stored_at,
            adapter.files_deleted_at is None,
        )
        for adapter, name in rows
    ]
    return deletable(
        adapters,
        {_held_for(of, name) for name in _in_use(session)},
        [(_held_for(of, before), _held_for(of, after)) for before, after in _moves(session)],
        num_moves_kept=settings.releases_kept,
        young_since=datetime.now(UTC) - timedelta(days=settings.adapters_kept_days),
    )


def _held_for(variants: Mapping[str, str], release: str) -> str:
    return variants.get(release, release)


def _in_use(session: Session) -> set[str]:
    head = session.execute(sa.select(Head.champion, Head.challenger)).one()
    canaries = session.execute(sa.select(Canary.champion, Canary.challenger).where(Canary.closed_at.is_(None)))
    running = TrainingRun.status == "running"
    found = {*head, *(name for canary in canaries for name in canary)}
    found.update(session.scalars(sa.select(TrainingRun.release).where(running)))
    with suppress(ConflictError):  # there is none yet
        found.add(previous_champion(session))
    began_at = session.scalar(sa.select(sa.func.min(TrainingRun.started_at)).where(running))
    if began_at is not None:  # a run goes on from whoever was champion when it began
        found.update(name for move in _moves(session, began_at) for name in move)
    return {name for name in found if name is not None}


def _moves(session: Session, since: datetime | None = None) -> list[Move]:
    moved = champion_before != champion_after
    query = sa.select(champion_before, champion_after).where(moved).order_by(AuditEntry.id.desc())
    if since is not None:
        query = query.where(AuditEntry.created_at >= since)
    return [(str(old), str(new)) for old, new in session.execute(query)]


def _mark(session: Session, going: Sequence[StoredAdapter], actor: str) -> None:
    digests = [adapter.digest for adapter in going]
    session.execute(sa.update(Adapter).where(Adapter.digest.in_(digests)).values(files_deleted_at=sa.func.now()))
    for adapter in going:
        reason = "nothing serves it, rolls back to it or goes on from it"
        audit.write(session, actor=actor, action="files_deleted", subject=adapter.release, reason=reason)


def _delete_files(sessions: Sessions, settings: Settings, found: Pruned, dry_run: bool) -> None:
    store = open_store(settings)
    with sessions.begin() as session:
        lock_out_erasures(session)  # nobody registers an adapter whose files are going
        rows = session.execute(sa.select(Adapter.digest, Adapter.files_deleted_at)).all()
        gone = {digest for digest, deleted_at in rows if deleted_at is not None}
        if not dry_run:
            found.num_leftovers = store.sweep(LEFTOVERS_AGE_S)
        there = store.digests()
        found.orphans = sorted(there.difference(digest for digest, _ in rows))
        if not dry_run:
            for digest in sorted(gone & there):
                store.delete(digest)
                found.num_deleted += 1
