"""Tables of deployment: adapters, releases, the head, canaries, attestations, the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base
from infra.tables import Timestamp


class Adapter(Base):
    """A LoRA adapter, immutable, named by the digest of its files.

    The digest also says where its files lie; ``stored_at``, since when (again, where they were deleted). ``mark``
    says that it learned from somebody who was forgotten since; ``files_deleted_at``, that nothing needed the files
    any more: the row stays, for history and lineage.
    """

    __tablename__ = "adapters"

    digest: Mapped[str] = mapped_column(primary_key=True)
    base_digest: Mapped[str]
    run_id: Mapped[str | None]
    manifest: Mapped[dict[str, Any]] = mapped_column(JSONB)
    mark: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    stored_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    files_deleted_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        sa.CheckConstraint("mark IN ('retrain-required', 'quarantined')", name="mark"),
        sa.CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name="digest"),
    )


class Release(Base):
    """A name under which the engine serves an adapter (or the base model); never reused."""

    __tablename__ = "releases"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    adapter_digest: Mapped[str | None] = mapped_column(sa.ForeignKey("adapters.digest"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class Head(Base):
    """The one row that says who is served what; moved by compare-and-swap on its version."""

    __tablename__ = "deployment_head"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]
    champion: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    challenger: Mapped[str | None] = mapped_column(sa.ForeignKey("releases.name"))
    canary_id: Mapped[int | None] = mapped_column(sa.ForeignKey("canaries.id"))
    share: Mapped[float] = mapped_column(default=0.0)

    __table_args__ = (sa.CheckConstraint("id = 1", name="single_row"),)


class Canary(Base):
    """A candidate among users: what it was compared with, and how it ended."""

    __tablename__ = "canaries"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    champion: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    challenger: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    share: Mapped[float]
    alpha: Mapped[float]
    gates: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    decision: Mapped[str | None]
    reason: Mapped[str | None]
    evidence: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    opened_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    closed_at: Mapped[datetime | None] = mapped_column(Timestamp)


class Attestation(Base):
    """Proof that a replica really serves a release: its probe log-probabilities."""

    __tablename__ = "attestations"

    release: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"), primary_key=True)
    replica: Mapped[str] = mapped_column(primary_key=True)
    adapter_digest: Mapped[str | None]
    probe: Mapped[list[float]] = mapped_column(JSONB)
    differs_from_base: Mapped[float]
    differs_from_champion: Mapped[float]
    attested_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class AuditEntry(Base):
    """Who did what, when and why. The database refuses to change or delete a row."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    reason: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
