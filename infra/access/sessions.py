"""Sessions of browsers, and tokens that can be used once: links that sign in, the state of a sign-in elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.access.tables import Account, LoginSession, OneTimeToken
from infra.access.tokens import digest, new_token
from infra.errors import UnauthorizedError

LINK_HOURS = 24.0
Purpose = Literal["link", "oidc"]


def begin(session: Session, account: Account, days: float) -> str:
    """Sign a browser in; return the cookie's value. Sessions that are over go with it."""
    token = new_token()
    now = datetime.now(UTC)
    session.execute(sa.delete(LoginSession).where(LoginSession.expires_at < now))
    session.execute(sa.delete(OneTimeToken).where(OneTimeToken.expires_at < now))
    session.add(LoginSession(digest=digest(token), account_id=account.id, expires_at=now + timedelta(days=days)))
    return token


def end(session: Session, session_digest: bytes) -> None:
    """Sign a browser out."""
    session.execute(sa.delete(LoginSession).where(LoginSession.digest == session_digest))


def offer(session: Session, purpose: Purpose, lasts_s: float, account: Account | None = None, **data: Any) -> str:
    """Return a token that can be used once within `lasts_s`."""
    token = new_token()
    session.execute(sa.delete(OneTimeToken).where(OneTimeToken.expires_at < sa.func.now()))
    expires_at = datetime.now(UTC) + timedelta(seconds=lasts_s)
    account_id = account.id if account else None
    session.add(
        OneTimeToken(digest=digest(token), purpose=purpose, account_id=account_id, data=data, expires_at=expires_at)
    )
    session.flush()
    return token


def link(session: Session, account: Account, public_url: str) -> str:
    """Return an address that signs a browser in once, within :data:`LINK_HOURS`.

    The token is in its fragment, which browsers tell no server and no log.
    """
    return f"{public_url}/login#{offer(session, 'link', LINK_HOURS * 3600, account)}"


def use(session: Session, purpose: Purpose, token: str) -> tuple[Account | None, dict[str, Any]]:
    """Take a token, which nobody else can from then on; return whose it is, and what was kept with it.

    Raises
    ------
    UnauthorizedError
        Code ``link_used``: it was used, is over, or never was.
    """
    row = session.execute(
        sa.delete(OneTimeToken)
        .where(
            OneTimeToken.digest == digest(token),
            OneTimeToken.purpose == purpose,
            OneTimeToken.expires_at > sa.func.now(),
        )
        .returning(OneTimeToken.account_id, OneTimeToken.data)
    ).one_or_none()
    account = session.get(Account, row.account_id) if row is not None and row.account_id else None
    if row is None or (account is not None and account.disabled_at is not None):
        raise UnauthorizedError(
            "This link was used, or is over. `everloop access link` makes another.", code="link_used"
        )
    return account, row.data
