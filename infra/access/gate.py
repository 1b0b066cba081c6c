"""The gate: who asks, and whether their role is enough. Every route says which role it needs.

    router = APIRouter(dependencies=[needs(Role.USER)])

A test fails for a route that says nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio.to_thread
import sqlalchemy as sa
from fastapi import Depends, Request
from sqlalchemy.orm import Session

from infra.access.limits import Limits
from infra.access.roles import EVERYBODY, Caller, Role, lesser
from infra.access.tables import Account, ApiKey, LoginSession
from infra.access.tokens import digest
from infra.db import Sessions, transaction
from infra.errors import ForbiddenError, UnauthorizedError
from infra.settings import Settings

KNOWN_FOR_S = 2.0  # a key that was revoked, or a role that was taken away, may be good for so long
NOTED_EVERY_S = 60  # when a key or session was last used, to the minute
MAX_KNOWN = 10_000
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def cookie_name(settings: Settings) -> str:
    """Return the name of the session's cookie; the port is in it, because all ports of a host share cookies."""
    url = urlsplit(settings.public_url or "")
    return "__Host-everloop" if url.scheme == "https" else f"everloop-{url.port or 80}"


class Gate:
    """Knows who asks by a cookie or a key; what it has read it believes for two seconds."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        self.sessions = sessions
        self.is_open = settings.access == "open"
        self.cookie = cookie_name(settings)
        self.is_secure = self.cookie.startswith("__Host-")
        self.limits = Limits(settings)
        self._generation = 0
        self._known: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()

    async def caller(self, request: Request) -> Caller | None:
        """Return who asks; None where they show nothing, or nothing that holds."""
        if self.is_open:
            return EVERYBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if key and scheme.lower() == "bearer":
            return await self._look_up(digest(key.strip()), _by_key)
        cookie = request.cookies.get(self.cookie)
        return await self._look_up(digest(cookie), _by_session) if cookie else None

    async def _look_up(self, shown: bytes, read: Any) -> Caller | None:
        known = self._known.get(shown)
        if known is not None and time.monotonic() - known[0] < KNOWN_FOR_S:
            return known[1]

        def look() -> Caller | None:
            with transaction(self.sessions) as session:
                found: Caller | None = read(session, shown)
                return found

        generation = self._generation
        found = await anyio.to_thread.run_sync(look)
        if generation != self._generation:  # it may have been read before what has changed since
            return await self._look_up(shown, read)
        self._known[shown] = (time.monotonic(), found)
        self._known.move_to_end(shown)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return found

    def forget(self) -> None:
        """Read everything anew: somebody's role or keys have just changed here."""
        self._generation += 1
        self._known.clear()


def _by_key(session: Session, shown: bytes) -> Caller | None:
    row = session.execute(
        sa.select(ApiKey, Account)
        .join(Account, Account.id == ApiKey.account_id)
        .where(
            ApiKey.digest == shown,
            ApiKey.revoked_at.is_(None),
            ApiKey.is_current,
            Account.disabled_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        return None
    key, account = row
    _note_use(session, ApiKey, ApiKey.id == key.id)
    return Caller(
        name=account.name,
        role=lesser(Role(key.role), Role(account.role)),
        user=account.user_id,
        acts_for_others=key.acts_for_others and account.role == Role.ADMIN,
        account_id=account.id,
        key_id=key.id,
        requests_per_minute=key.requests_per_minute,
    )


def _by_session(session: Session, shown: bytes) -> Caller | None:
    account = session.scalar(
        sa.select(Account)
        .join(LoginSession, LoginSession.account_id == Account.id)
        .where(LoginSession.digest == shown, LoginSession.expires_at > sa.func.now(), Account.disabled_at.is_(None))
    )
    if account is None:
        return None
    _note_use(session, LoginSession, LoginSession.digest == shown)
    return Caller(
        name=account.name,
        role=Role(account.role),
        user=account.user_id,
        account_id=account.id,
        session_digest=shown,
    )


def _note_use(session: Session, table: type[ApiKey] | type[LoginSession], which: sa.ColumnElement[bool]) -> None:
    stale = sa.func.now() - sa.text(f"interval '{NOTED_EVERY_S} s'")
    is_stale = sa.or_(table.last_used_at.is_(None), table.last_used_at < stale)
    session.execute(sa.update(table).where(which, is_stale).values(last_used_at=sa.func.now()))


async def caller_of(request: Request) -> Caller | None:
    """Return who asks, or None."""
    found: Caller | None = await request.app.state.gate.caller(request)
    return found


@dataclass(frozen=True, slots=True)
class Needs:
    """What a route asks of whoever calls it; None lets everybody in."""

    role: Role | None

    async def __call__(self, request: Request, caller: Annotated[Caller | None, Depends(caller_of)]) -> None:
        """Let the request through.

        Raises
        ------
        UnauthorizedError
            Where nobody known asks.
        ForbiddenError
            Code ``role_needed``.
        TooManyError
            Code ``too_many_requests``; only what changes something is counted.
        """
        if self.role is None:
            return
        caller = signed_in(caller)
        if not caller.role.reaches(self.role):
            raise ForbiddenError(f"This needs the role {self.role}; yours is {caller.role}.", code="role_needed")
        if request.method not in SAFE_METHODS and not hasattr(request.state, "is_counted"):
            request.state.is_counted = True  # a router and its route may both ask for a role
            limits = request.app.state.gate.limits
            limits.count_request(caller)
            request.state.rate_limits = limits.standing(caller)


def needs(role: Role | None) -> Any:
    """Return the dependency of a route or router that lets in who has the role; None means everybody."""
    return Depends(Needs(role))


def signed_in(caller: Annotated[Caller | None, Depends(caller_of)]) -> Caller:
    """Return who asks; for routes that need a role.

    Raises
    ------
    UnauthorizedError
    """
    if caller is None:
        raise UnauthorizedError("Sign in, or send a key: Authorization: Bearer everloop_…")
    return caller


SignedIn = Annotated[Caller, Depends(signed_in)]
