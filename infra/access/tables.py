"""Tables of access: accounts, their sessions and keys, and what may be used once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column

from infra.access.roles import Role
from infra.db import Base
from infra.tables import Timestamp

_ROLES = f"role IN ({', '.join(repr(role.value) for role in Role)})"


class Account(Base):
    """Somebody who may come in.

    ``user_id`` is who they are to the log of answers and signals; whoever is forgotten gets another. Who comes from
    an identity provider is known by its ``issuer`` and their ``subject`` there. ``name_key`` is the name however it
    is written; ``is_service`` marks an account that no person has.
    """

    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    name_key: Mapped[str] = mapped_column(unique=True)
    is_service: Mapped[bool] = mapped_column(default=False)
    role: Mapped[str]
    user_id: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str | None]
    issuer: Mapped[str | None]
    subject: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    disabled_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        sa.CheckConstraint(_ROLES, name="role"),
        sa.UniqueConstraint("issuer", "subject"),
    )


class ApiKey(Base):
    """A key of an account; it may do what both its role and its account's may."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[str] = mapped_column(sa.ForeignKey("accounts.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    digest: Mapped[bytes] = mapped_column(unique=True)
    role: Mapped[str]
    acts_for_others: Mapped[bool] = mapped_column(default=False)
    requests_per_minute: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    last_used_at: Mapped[datetime | None] = mapped_column(Timestamp)
    revoked_at: Mapped[datetime | None] = mapped_column(Timestamp)
    replaced_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (sa.CheckConstraint(_ROLES, name="role"),)

    @hybrid_property
    def is_current(self) -> bool:
        """Whether it has not ended by time."""
        return self.expires_at is None or self.expires_at > datetime.now(UTC)

    @is_current.inplace.expression
    @classmethod
    def _is_current(cls) -> sa.ColumnElement[bool]:
        return sa.func.coalesce(cls.expires_at > sa.func.now(), sa.true())


class LoginSession(Base):
    """A browser that is signed in, by the digest of its cookie."""

    __tablename__ = "login_sessions"

    digest: Mapped[bytes] = mapped_column(primary_key=True)
    account_id: Mapped[str] = mapped_column(sa.ForeignKey("accounts.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    last_used_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)


class OneTimeToken(Base):
    """Something that can be used once, such as a link that signs in: its row goes as it is used."""

    __tablename__ = "one_time_tokens"

    digest: Mapped[bytes] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    account_id: Mapped[str | None] = mapped_column(sa.ForeignKey("accounts.id", ondelete="CASCADE"))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    expires_at: Mapped[datetime] = mapped_column(Timestamp)
