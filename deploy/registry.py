"""The registry: immutable adapters, checked by digest, and the releases that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import model_card
from deploy.adapter_check import BaseShapes, check_adapter
from deploy.adapter_files import adapter_digest, file_digests
from deploy.gates import GateResult
from deploy.names import ALIASES, CHALLENGER, CHAMPION, check_name
from deploy.store import CARD, DirectoryStore, open_store
from deploy.tables import Adapter, Attestation, Canary, Head, Release
from infra.db import lock_until_commit
from infra.errors import ConflictError, IntegrityError, NotFoundError, SetupError
from infra.settings import BASE_MODEL_NAME, Settings
from infra.weights import base_model_digest


def register(
    session: Session,
    settings: Settings,
    source: Path,
    *,
    run_id: str | None,
    manifest: Mapping[str, Any],
    name: str | None = None,
) -> Release:
    """Check an adapter, copy it into the store under its digest and give it a release name.

    What is checked is the copy that is kept. Registering the same files again returns the release that they have,
    and puts its files back where they were deleted or damaged.

    Parameters
    ----------
    manifest
        What is known of where it comes from; the digests of its files and of the present base model are added.
    name
        What the release is called; numbered, if unset.

    Raises
    ------
    IntegrityError
        As :func:`deploy.adapter_check.check_adapter` does, and ``adapter_unsafe``, ``adapter_incomplete``.
    InvalidRequestError
        Codes ``name_protected`` and ``name_invalid``.
    ConflictError
        Code ``name_taken``, or ``adapter_known`` where the files have another name.
    OSError
        Such as a full disk; then nothing is left of it.
    """
    if name is not None:
        check_name(name)
    lock_out_erasures(session)
    base_digest = present_base(settings)
    store = open_store(settings)
    with store.staged(source) as staged:
        check_adapter(staged, BaseShapes.read(settings.base_model_dir), settings.max_lora_rank)
        files = file_digests(staged)
        digest = adapter_digest(files)
        manifest = {**manifest, "base_digest": base_digest, "files": files, "digest": digest}
        own_name = Release.variant_of.is_(None)
        known = session.scalars(sa.select(Release).where(Release.adapter_digest == digest, own_name)).one_or_none()
        if known is None:
            if name is not None and session.scalar(sa.select(sa.exists().where(Release.name == name))):
                raise ConflictError(f"There is a release {name!r} already.", code="name_taken", param="name")
            store.put(staged, digest, manifest)
            return _insert(session, digest, run_id, manifest, name)
        _restore(session, store, staged, known, base_digest, name)
        return known


def _insert(
    session: Session, digest: str, run_id: str | None, manifest: Mapping[str, Any], name: str | None
) -> Release:
    base_digest = manifest["base_digest"]
    session.add(Adapter(digest=digest, base_digest=base_digest, run_id=run_id, manifest=dict(manifest)))
    session.flush()
    number = session.scalar(sa.select(sa.func.count()).select_from(Release))
    release = Release(name=name or f"r{number}-{digest[:8]}", adapter_digest=digest)
    session.add(release)
    session.flush()
    return release


def _restore(
    session: Session, store: DirectoryStore, staged: Path, known: Release, base_digest: str, name: str | None
) -> None:
    """Put the files of a known release back, unless they are there and whole."""
    if name not in (None, known.name):
        raise ConflictError(f"These files are registered already, as {known.name!r}.", code="adapter_known")
    adapter = session.get_one(Adapter, known.adapter_digest)
    _check_base(adapter, base_digest)
    try:
        store.fetch(adapter.digest)
    except IntegrityError:
        store.put(staged, adapter.digest, adapter.manifest)
    if adapter.files_deleted_at is not None:
        adapter.files_deleted_at, adapter.stored_at = None, sa.func.now()
        session.flush()


def take_back(session: Session, name: str, run_id: str) -> str | None:
    """Undo the registration of a release by a run that came to nothing.

    Returns
    -------
    str or None
        The adapter's digest, whose files are to be removed once this is committed. None, and nothing is changed,
        where the release is not of this run, or somebody has met it.
    """
    lock_out_erasures(session)
    lock_head(session)  # nobody promotes it meanwhile
    release = get_release(session, name)
    adapter = session.get(Adapter, release.adapter_digest)
    met = sa.or_(
        sa.exists().where(sa.or_(Head.champion == name, Head.challenger == name)),
        sa.exists().where(sa.or_(Canary.champion == name, Canary.challenger == name)),
    )
    if adapter is None or adapter.run_id != run_id or session.scalar(sa.select(met)):
        return None
    session.execute(sa.delete(Attestation).where(Attestation.release == name))
    session.delete(release)
    session.flush()
    session.delete(adapter)
    return adapter.digest


def get_release(session: Session, name: str) -> Release:
    """Return a release; the aliases ``champion`` and ``challenger`` are what the head names now.

    Raises
    ------
    NotFoundError
        Code ``release_not_found``.
    """
    meant = name
    if name in ALIASES:
        column = Head.champion if name == CHAMPION else Head.challenger
        meant = session.scalar(sa.select(column)) or name
    release = session.scalars(sa.select(Release).where(Release.name == meant)).one_or_none()
    if release is None:
        why = "no canary is open" if name == CHALLENGER else "`everloop releases list` shows what there is"
        raise NotFoundError(f"There is no release {name!r}: {why}.", code="release_not_found", param="release")
    return release


def present_base(settings: Settings) -> str:
    """Return the digest of the base model that is served now.

    Raises
    ------
    SetupError
        Code ``model_weights_missing`` where neither its weights nor a note of their digest are on this machine.
    """
    try:
        return base_model_digest(settings.base_model_dir)
    except OSError as error:
        raise SetupError(
            f"The base model {settings.base_model} is not on this machine, and adapters are only for their own.",
            code="model_weights_missing",
        ) from error


def check_servable(session: Session, settings: Settings, name: str) -> str | None:
    """Check that a release may be loaded and promoted, as far as the database tells.

    Returns
    -------
    str or None
        The digest of its adapter; None for the base model.

    Raises
    ------
    IntegrityError
        Code ``adapter_of_another_base``, ``adapter_quarantined`` where it may not be served any more,
        ``adapter_deleted`` where its files are gone.
    """
    digest = get_release(session, name).adapter_digest
    if digest is None:
        return None
    adapter = session.get_one(Adapter, digest)
    _check_base(adapter, present_base(settings))
    if adapter.mark == "quarantined":
        raise IntegrityError(
            f"Adapter {digest[:12]} is quarantined: it learned from a user who was forgotten.",
            code="adapter_quarantined",
        )
    check_kept(session, name)
    return digest


def check_kept(session: Session, name: str) -> None:
    """Check that the files of a release were not deleted.

    Raises
    ------
    IntegrityError
        Code ``adapter_deleted``.
    """
    release = get_release(session, name)
    adapter = (
        session.get(Adapter, release.adapter_digest, populate_existing=True) if release.adapter_digest else None
    )
    if adapter is not None and adapter.files_deleted_at is not None:
        raise IntegrityError(
            f"The files of {release.name} were deleted on {adapter.files_deleted_at:%Y-%m-%d}: nothing needed them "
            "any more. Import them again from where you keep them, or promote another release.",
            code="adapter_deleted",
        )


def verified_path(session: Session, settings: Settings, name: str) -> Path | None:
    """Return a release's adapter on this machine, every file of it checked now; None for the base model.

    Raises
    ------
    IntegrityError
        As :func:`check_servable` does, and :meth:`deploy.store.DirectoryStore.fetch`.
    UnavailableError
        Code ``adapter_store_unavailable``.
    """
    digest = check_servable(session, settings, name)
    return open_store(settings).fetch(digest) if digest else None


def _check_base(adapter: Adapter, base_digest: str) -> None:
    if adapter.base_digest != base_digest:
        raise IntegrityError(
            f"Adapter {adapter.digest[:12]} was trained on another base model ({adapter.base_digest[:12]}, not "
            f"{base_digest[:12]}). Promote `base` first, or set base_model back.",
            code="adapter_of_another_base",
        )


def config_of(session: Session, release: str) -> dict[str, Any] | None:
    """Return the configuration of the run that made a release; None for the base model and imported adapters."""
    digest = get_release(session, release).adapter_digest
    return session.get_one(Adapter, digest).manifest.get("config") if digest else None


def clean_ancestor(session: Session, release: str) -> str:
    """Return `release`, or the newest one behind it with its files that learned from nobody forgotten since."""
    return next(
        name
        for name, adapter in _lineage(session, release)
        if adapter is None or (adapter.mark is None and adapter.files_deleted_at is None)
    )


def ancestors(session: Session, release: str) -> list[str]:
    """Return the releases that a release goes on from, the nearest first, down to the base model."""
    return [name for name, _ in _lineage(session, release)][1:]


def _lineage(session: Session, release: str) -> Iterator[tuple[str, Adapter | None]]:
    """Yield a release, then what each goes on from, with their adapters; the last is the base model, with None."""
    name = release
    while (digest := get_release(session, name).adapter_digest) is not None:
        adapter = session.get_one(Adapter, digest)
        yield name, adapter
        name = str(adapter.manifest.get("started_from", BASE_MODEL_NAME))
    yield name, None


def write_card(session: Session, settings: Settings, release: str, gates: Sequence[GateResult]) -> None:
    """Put a card with lineage and evaluation beside an adapter's files; it is no part of its digest."""
    adapter = session.get_one(Adapter, get_release(session, release).adapter_digest)
    base_model = settings.base_model_dir.name
    page = model_card.page_of(release, base_model, adapter.manifest, gates, ancestors(session, release))
    open_store(settings).annotate(adapter.digest, CARD, page)


def lock_head(session: Session) -> None:
    """Let nobody move the head until this transaction has ended."""
    session.execute(sa.select(Head.id).with_for_update())


def lock_out_erasures(session: Session) -> None:
    """Let no erasure mark adapters until this transaction has ended, so that none is registered behind its back."""
    lock_until_commit(session, "erasure")


def is_quarantined(session: Session, release: str) -> bool:
    """Tell whether a release must not be served any more."""
    mark = session.scalar(
        sa.select(Adapter.mark)
        .join(Release, Release.adapter_digest == Adapter.digest)
        .where(Release.name == release)
    )
    return mark == "quarantined"
