"""Tables of deployment: adapters, releases, the head, canaries and their events, attestations, the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
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
    """A name under which an adapter (or the base model) is served; never reused.

    ``probe`` is what was measured where it was first proved to be served (:mod:`deploy.attest`), on the base
    model, and by an engine of the version, that ``probe_base`` names.
    """

    __tablename__ = "releases"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    adapter_digest: Mapped[str | None] = mapped_column(sa.ForeignKey("adapters.digest"))
    probe: Mapped[list[float] | None] = mapped_column(JSONB(none_as_null=True))
    probe_base: Mapped[str | None]
    # How it answers, where that is part of what it is: {"best_of": 4}; and the release whose weights it has then.
    decoding: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    variant_of: Mapped[str | None] = mapped_column(sa.ForeignKey("releases.name"))
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
    autonomy: Mapped[str | None]

    __table_args__ = (
        sa.CheckConstraint("id = 1", name="single_row"),
        sa.CheckConstraint("autonomy IN ('observe', 'propose', 'canary', 'auto')", name="autonomy"),
    )


class Canary(Base):
    """A candidate among users: what it was compared with, by which plan, and how it ended.

    ``plan`` is a :class:`deploy.rollout.Plan`; ``looked_at`` says until when its log holds what happened.
    """

    __tablename__ = "canaries"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    champion: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    challenger: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    plan: Mapped[dict[str, Any]] = mapped_column(JSONB)
    looked_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    gates: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    decision: Mapped[str | None]
    reason: Mapped[str | None]
    evidence: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    opened_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    closed_at: Mapped[datetime | None] = mapped_column(Timestamp)


class CanaryEvent(Base):
    """Something that counts in a canary (:class:`deploy.rollout.Event`): its log, from which it can be recomputed.

    The database refuses to change or delete a row. None says whose trial or vote it was.
    """

    __tablename__ = "canary_events"

    canary_id: Mapped[int] = mapped_column(sa.ForeignKey("canaries.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at_s: Mapped[float]
    kind: Mapped[str]
    arm: Mapped[str | None]
    flags: Mapped[list[str]] = mapped_column(ARRAY(sa.String))
    good: Mapped[bool | None]

    __table_args__ = (sa.CheckConstraint("kind IN ('trial', 'vote', 'tick', 'hold', 'resume')", name="kind"),)


class CanaryUser(Base):
    """Who has been counted in an open canary, so that nobody counts twice; gone when it closes."""

    __tablename__ = "canary_users"

    canary_id: Mapped[int] = mapped_column(sa.ForeignKey("canaries.id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    voted: Mapped[bool]


class Proposal(Base):
    """Something that the platform would do and may not: an operator decides."""

    __tablename__ = "proposals"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    action: Mapped[str]
    release: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"))
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    closed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    outcome: Mapped[str | None]

    __table_args__ = (
        sa.CheckConstraint("action IN ('canary', 'promote')", name="action"),
        sa.Index(
            "ix_proposals_open", "action", "release", unique=True, postgresql_where=sa.text("closed_at IS NULL")
        ),
    )


class Attestation(Base):
    """Proof that a replica really serves a release, or what is wrong with it (``problem``).

    ``served_as`` is what the replica calls it: a name that its engine has not had before, since what an engine has
    cached goes by names.
    """

    __tablename__ = "attestations"

    release: Mapped[str] = mapped_column(sa.ForeignKey("releases.name"), primary_key=True)
    replica: Mapped[str] = mapped_column(primary_key=True)
    served_as: Mapped[str]
    adapter_digest: Mapped[str | None]
    probe: Mapped[list[float]] = mapped_column(JSONB)
    differs_from_base: Mapped[float | None]
    differs_from_others: Mapped[float | None]
    disagrees: Mapped[float | None]
    problem: Mapped[str | None]
    attested_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class Replica(Base):
    """An engine as the reconciler last saw it.

    ``started_at_s`` tells one life of its process from the next; ``spoiled`` counts, for that life, the names
    of each release under which something else was served.
    """

    __tablename__ = "replicas"

    url: Mapped[str] = mapped_column(primary_key=True)
    is_up: Mapped[bool]
    problem: Mapped[str | None]
    started_at_s: Mapped[float | None]
    spoiled: Mapped[dict[str, int]] = mapped_column(JSONB, default=dict)
    seen_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class WantedRelease(Base):
    """A release that replicas are to hold for a time though the head does not name it: it is about to."""

    __tablename__ = "wanted_releases"

    release: Mapped[str] = mapped_column(sa.ForeignKey("releases.name", ondelete="CASCADE"), primary_key=True)
    until: Mapped[datetime] = mapped_column(Timestamp)


class AuditEntry(Base):
    """Who did what, when, why and from where. The database refuses to change or delete a row.

    ``hash`` is over the row and ``previous_hash``, and made by the database (:mod:`deploy.audit`), as the id is.
    """

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    reason: Mapped[str]
    address: Mapped[str | None]
    details: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    previous_hash: Mapped[str] = mapped_column(sa.FetchedValue(), unique=True)
    hash: Mapped[str] = mapped_column(sa.FetchedValue())
