"""Which encoder the reward model reads answers with: the frozen one of the settings, or a backbone that won."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session

from feedback.tables import Episode, Feedback
from feedback.users import TOMBSTONE
from infra.errors import IntegrityError
from infra.events import RebuildRequested
from infra.log import outbox
from infra.settings import Settings
from reward.base_model_encoder import ADAPTER_FILES, BaseModelEncoder, adapter_digest
from reward.encoder import Encoder, open_encoder
from reward.tables import RewardEncoder

log = logging.getLogger("everloop.reward")


def open_active_encoder(session: Session, settings: Settings, num_threads: int | None = None) -> Encoder:
    """Open the encoder that is active: the backbone that won last, else the frozen one of the settings.

    A backbone of another base model, layer or recipe than the settings' is passed over.

    Raises
    ------
    IntegrityError
        Code ``backbone_changed`` where the files of the active backbone are not what was trained.
    """
    row = session.scalars(sa.select(RewardEncoder).where(RewardEncoder.status == "active")).one_or_none()
    if row is not None and row.adapter_path and row.adapter_digest:
        encoder = open_backbone(settings, Path(row.adapter_path), row.adapter_digest, num_threads)
        if encoder.name == row.name:
            return encoder
        log.warning("backbone %s is not of this base model, layer or recipe; the frozen features serve", row.name)
    return open_encoder(settings, num_threads)


def open_backbone(settings: Settings, path: Path, digest: str, num_threads: int | None = None) -> BaseModelEncoder:
    """Open the base model with a trained adapter, after checking its files against `digest`.

    Raises
    ------
    IntegrityError
        Code ``backbone_changed``.
    """
    whole = all((path / name).is_file() for name in ADAPTER_FILES)
    if not whole or adapter_digest(path) != digest:
        raise IntegrityError(
            f"The files of backbone {digest[:12]} are gone or changed since it was trained; restore them, or "
            "retire it in reward_encoders.",
            code="backbone_changed",
        )
    return BaseModelEncoder(settings.base_model_dir, settings.encoder_layer, num_threads, adapter_dir=path)


def keep_adapter(source: Path, backbones_dir: Path) -> tuple[Path, str]:
    """Copy a trained adapter under its digest, whole or not at all; return the directory and the digest."""
    digest = adapter_digest(source)
    target = backbones_dir / digest
    if not target.exists():
        staging = backbones_dir / f".{digest[:12]}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(source / name, staging / name)
        staging.rename(target)
    return target, digest


def add_candidate(session: Session, name: str, path: Path, digest: str, training: dict[str, Any]) -> None:
    """Note a trained backbone that has yet to be judged; training the same again changes nothing."""
    session.execute(
        insert(RewardEncoder)
        .values(
            name=name,
            kind="backbone",
            adapter_path=str(path),
            adapter_digest=digest,
            status="candidate",
            evaluation={"training": training},
        )
        .on_conflict_do_nothing()
    )


def trained_on(session: Session, training_digest: str) -> RewardEncoder | None:
    """Return the backbone that was trained on exactly this data, if there is one."""
    wanted = RewardEncoder.evaluation["training"]["digest"].astext == training_digest
    return session.scalars(sa.select(RewardEncoder).where(wanted)).first()


def reject(session: Session, names: Iterable[str], evaluation: dict[str, Any]) -> None:
    """Note that candidates did not win, and why."""
    rows = session.scalars(
        sa.select(RewardEncoder).where(RewardEncoder.name.in_(list(names)), RewardEncoder.status == "candidate")
    )
    for row in rows:
        row.status = "rejected"
        row.evaluation = {**row.evaluation, **evaluation}


def activate(session: Session, name: str, replaced: Encoder, evaluation: dict[str, Any]) -> bool:
    """Make a candidate the active encoder, and ask the reward worker to refit its head under it.

    All within the caller's transaction, so that the row and the event stand or fall together.

    Parameters
    ----------
    replaced
        The encoder that was active until now.

    Returns
    -------
    bool
        Whether it is active now; not, if it was retired meanwhile or learned from a user who was forgotten.
    """
    # Locked before the look at who was forgotten: an erasure that comes later waits, and retires what is active.
    row = session.get_one(RewardEncoder, name, with_for_update=True, populate_existing=True)
    if row.status != "candidate" or _learned_from_forgotten(session, row):
        return row.status == "active"
    kind = "base-model" if isinstance(replaced, BaseModelEncoder) else "sentence"
    # A backbone has its row already; the frozen encoder gets one when it is first replaced.
    session.execute(
        insert(RewardEncoder)
        .values(name=replaced.name, kind=kind, status="retired", evaluation={})
        .on_conflict_do_nothing()
    )
    session.execute(sa.update(RewardEncoder).where(RewardEncoder.status == "active").values(status="retired"))
    row.status = "active"
    row.evaluation = {**row.evaluation, **evaluation}
    session.flush()
    _ask_to_rebuild(session, name, f"{name} won against {replaced.name}: {evaluation['reason']}")
    return True


def retire_taught_by(session: Session, settings: Settings, feedback_ids: Iterable[str]) -> list[str]:
    """Retire the backbones that were trained on any of these signals, for an erasure; return their names.

    Where the active one is among them, the frozen encoder takes over and the worker is asked to refit. The files go
    with the next :func:`sweep`. Safe to repeat.
    """
    ids = sa.cast(list(feedback_ids), ARRAY(sa.Text))
    taught = RewardEncoder.evaluation["training"]["feedback_ids"].op("?|")(ids)
    query = sa.select(RewardEncoder).where(taught).order_by(RewardEncoder.name).with_for_update()
    rows = session.scalars(query).all()
    was_active = any(row.status == "active" for row in rows)
    for row in rows:
        row.status = "retired"
        row.adapter_path = None
    session.flush()
    if was_active:
        _ask_to_rebuild(session, open_encoder(settings).name, "the backbone learned from a user who was forgotten")
    return [row.name for row in rows]


def sweep(session: Session, backbones_dir: Path) -> None:
    """Remove what no row stands for: unfinished trainings, adapters that were rejected or must be forgotten.

    Only for who holds the lock of the backbone: nobody else trains or copies meanwhile.
    """
    kept = session.scalars(
        sa.select(RewardEncoder.adapter_digest).where(
            RewardEncoder.status != "rejected", RewardEncoder.adapter_path.is_not(None)
        )
    ).all()
    for path in backbones_dir.glob("*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _learned_from_forgotten(session: Session, row: RewardEncoder) -> bool:
    used = sa.select(Feedback.id).join(Episode, Episode.id == Feedback.episode_id)
    used = used.where(
        Feedback.id.in_(row.evaluation["training"]["feedback_ids"]),
        sa.or_(Feedback.user_id.startswith(TOMBSTONE), Episode.user_id.startswith(TOMBSTONE)),
    )
    return bool(session.scalar(sa.select(used.exists())))


def _ask_to_rebuild(session: Session, encoder: str, reason: str) -> None:
    outbox.append(session, RebuildRequested(encoder=encoder, reason=reason), key=encoder)
