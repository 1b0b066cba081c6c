"""API keys: shown once, stored as a digest, ended by time or by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.access.roles import Role
from infra.access.tables import Account, ApiKey
from infra.access.tokens import KEY_PREFIX, digest, new_token
from infra.errors import ConflictError, ForbiddenError, NotFoundError
from infra.ids import new_id


def issue(
    session: Session,
    account: Account,
    name: str,
    *,
    role: Role = Role.USER,
    acts_for_others: bool = False,
    days: float | None = None,
    requests_per_minute: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; return it with its secret, which nobody can be shown again.

    Raises
    ------
    ForbiddenError
        Code ``role_needed`` where the key would do more than its account; only an admin's may act for others.
    """
    owner = Role(account.role)
    if not owner.reaches(role) or (acts_for_others and owner is not Role.ADMIN):
        raise ForbiddenError(
            "A key does no more than its account, and only an admin's may act for others.", code="role_needed"
        )
    secret = new_token(KEY_PREFIX)
    key = ApiKey(
        id=new_id("key"),
        account_id=account.id,
        name=name,
        digest=digest(secret),
        role=role,
        acts_for_others=acts_for_others,
        requests_per_minute=requests_per_minute,
        expires_at=None if days is None else datetime.now(UTC) + timedelta(days=days),
    )
    session.add(key)
    session.flush()
    return key, secret


def of(session: Session, account: Account) -> list[ApiKey]:
    """Return the keys of an account that are good, the newest first."""
    query = sa.select(ApiKey).where(ApiKey.account_id == account.id, ApiKey.revoked_at.is_(None), ApiKey.is_current)
    return list(session.scalars(query.order_by(ApiKey.created_at.desc(), ApiKey.id)))


def get(session: Session, key_id: str, account: Account | None = None) -> ApiKey:
    """Return a key that is not revoked; of an account, if one is given.

    Raises
    ------
    NotFoundError
        Code ``key_not_found``.
    """
    key = session.get(ApiKey, key_id)
    if key is None or key.revoked_at is not None or (account is not None and key.account_id != account.id):
        raise NotFoundError(f"There is no key {key_id!r}.", code="key_not_found")
    return key


def revoke(key: ApiKey) -> None:
    """End a key; gates that have seen it just now forget it within seconds."""
    key.revoked_at = sa.func.now()


def rotate(session: Session, key: ApiKey, grace_s: float) -> tuple[ApiKey, str]:
    """Make a key like another, which ends after `grace_s`; return the new one, with its secret.

    It lasts as long as the other did when it was made.

    Raises
    ------
    ConflictError
        Code ``key_over`` for a key that has ended, or was replaced already.
    """
    now = datetime.now(UTC)
    if key.replaced_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise ConflictError("This key has ended or was replaced; make a new one.", code="key_over")
    lasts = None if key.expires_at is None else key.expires_at - key.created_at
    secret = new_token(KEY_PREFIX)
    fresh = ApiKey(
        id=new_id("key"),
        digest=digest(secret),
        **{
            name: getattr(key, name)
            for name in ("account_id", "name", "role", "acts_for_others", "requests_per_minute")
        },
        expires_at=None if lasts is None else now + lasts,
    )
    key.replaced_at, ends_at = now, now + timedelta(seconds=grace_s)
    key.expires_at = ends_at if key.expires_at is None else min(ends_at, key.expires_at)
    session.add(fresh)
    session.flush()
    return fresh, secret
