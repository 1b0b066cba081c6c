"""The registry: immutable adapters, checked by digest, and the releases that name them."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import model_card
from deploy.gates import GateResult
from deploy.tables import Adapter, Attestation, Canary, Head, Release
from infra.db import lock_until_commit
from infra.errors import IntegrityError, NotFoundError
from infra.files import write_whole
from infra.settings import BASE_MODEL_NAME

MANIFEST = "everloop.json"
CARD = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def file_digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each adapter file.

    Raises
    ------
    IntegrityError
        Code ``adapter_incomplete`` where a file is missing, ``adapter_unsafe`` for a link.
    """
    digests = {}
    for name in ADAPTER_FILES:
        path = directory / name
        if path.is_symlink():
            raise IntegrityError(f"{name} is a link; adapters are plain files.", code="adapter_unsafe")
        if not path.is_file():
            raise IntegrityError(f"The adapter has no {name}.", code="adapter_incomplete")
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def adapter_digest(files: dict[str, str]) -> str:
    """Return the digest that names an adapter."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def register(
    session: Session, source: Path, adapters_dir: Path, *, run_id: str | None, manifest: dict[str, Any]
) -> Release:
    """Copy an adapter into the registry under its digest and give it a release name.

    The copy appears under its final name in one rename, so a crash leaves no half adapter behind a digest.
    Registering the same files again returns the release that they have.
    """
    files = file_digests(source)
    digest = adapter_digest(files)
    known = session.scalars(sa.select(Release).where(Release.adapter_digest == digest)).first()
    if known is not None:
        return known
    manifest = {**manifest, "files": files, "digest": digest}
    target = adapters_dir / digest
    if not target.exists():
        staging = adapters_dir / f".{digest[:12]}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        try:
            for name in ADAPTER_FILES:
                shutil.copyfile(source / name, staging / name)
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
            staging.rename(target)
        except OSError:  # such as a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise
    session.add(
        Adapter(
            digest=digest,
            path=str(target),
            base_digest=manifest["base_digest"],
            run_id=run_id,
            manifest=manifest,
        )
    )
    session.flush()
    number = session.scalar(sa.select(sa.func.count()).select_from(Release))
    release = Release(name=f"r{number}-{digest[:8]}", adapter_digest=digest)
    session.add(release)
    session.flush()
    return release


def take_back(session: Session, name: str, run_id: str) -> Path | None:
    """Undo the registration of a release by a run that came to nothing.

    Returns
    -------
    Path or None
        The adapter's directory, to be removed once this is committed. None, and nothing is changed, where the
        release is not of this run, or somebody has met it.
    """
    lock_out_erasures(session)
    session.execute(sa.select(Head.id).with_for_update())  # nobody promotes it meanwhile
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
    return Path(adapter.path)


def get_release(session: Session, name: str) -> Release:
    """Return a release.

    Raises
    ------
    NotFoundError
        Code ``release_not_found``.
    """
    release = session.scalars(sa.select(Release).where(Release.name == name)).one_or_none()
    if release is None:
        raise NotFoundError(f"There is no release {name!r}.", code="release_not_found", param="release")
    return release


def verified_path(session: Session, digest: str, base_digest: str | None = None) -> Path:
    """Return an adapter's directory after checking every file against the digest.

    Parameters
    ----------
    base_digest
        The base model that it must have been trained on; any, if unset.

    Raises
    ------
    IntegrityError
        Code ``adapter_changed`` where a file is not what was registered, ``adapter_quarantined`` where it may not
        be served any more, ``adapter_of_another_base``.
    """
    adapter = session.get_one(Adapter, digest)
    if base_digest not in (None, adapter.base_digest):
        raise IntegrityError(
            f"Adapter {digest[:12]} was trained on another base model ({adapter.base_digest[:12]}, not "
            f"{str(base_digest)[:12]}). Promote `base` first, or set base_model back.",
            code="adapter_of_another_base",
        )
    if adapter.mark == "quarantined":
        raise IntegrityError(
            f"Adapter {digest[:12]} is quarantined: it learned from a user who was forgotten.",
            code="adapter_quarantined",
        )
    path = Path(adapter.path)
    if adapter_digest(file_digests(path)) != digest:
        raise IntegrityError(
            f"The files of adapter {digest[:12]} changed after it was registered; it will not be loaded.",
            code="adapter_changed",
        )
    return path


def config_of(session: Session, release: str) -> dict[str, Any] | None:
    """Return the configuration of the run that made a release; None for the base model and imported adapters."""
    digest = get_release(session, release).adapter_digest
    return session.get_one(Adapter, digest).manifest.get("config") if digest else None


def clean_ancestor(session: Session, release: str) -> str:
    """Return `release`, or the newest release behind it that learned from nobody who was forgotten since."""
    return next(name for name, adapter in _lineage(session, release) if adapter is None or adapter.mark is None)


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


def write_card(session: Session, release: str, base_model: str, gates: Sequence[GateResult]) -> None:
    """Put a card with lineage and evaluation beside an adapter's files; it is no part of its digest."""
    adapter = session.get_one(Adapter, get_release(session, release).adapter_digest)
    page = model_card.page_of(release, base_model, adapter.manifest, gates, ancestors(session, release))
    write_whole(Path(adapter.path) / CARD, page)


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
