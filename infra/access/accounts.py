"""Accounts: making them, signing in by password, what they may do."""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy.orm import Session

from infra.access.roles import Role
from infra.access.tables import Account, ApiKey, LoginSession, OneTimeToken
from infra.errors import ConflictError, ForbiddenError, InvalidRequestError, NotFoundError, UnauthorizedError
from infra.ids import new_id

MIN_PASSWORD_CHARS, MAX_PASSWORD_CHARS = 12, 1024
MAX_NAME_CHARS = 128
OWNER = "owner"  # whoever has the machine
USER_PREFIX = "u_"  # of the ids of whoever has an account: only accounts give them out
_hasher = PasswordHasher()  # argon2id with the library's parameters, which follow RFC 9106
# Verified for names that nobody has: an answer must not come sooner because there is no such account.
_NOBODYS = _hasher.hash(uuid.uuid4().hex)


def create(
    session: Session,
    name: str,
    role: Role,
    *,
    issuer: str | None = None,
    subject: str | None = None,
    is_service: bool = False,
) -> Account:
    """Make an account; it is entered by a link, by a password once it has one, or from its identity provider.

    Raises
    ------
    InvalidRequestError
        Code ``invalid_name``.
    ConflictError
        Code ``name_taken``.
    """
    name = _checked(name)
    known: dict[str, Any] = {"issuer": issuer, "subject": subject, "is_service": is_service}
    account = Account(id=new_id("ac"), name=name, name_key=_key_of(name), role=role, user_id=users_id(), **known)
    try:
        with session.begin_nested():  # of two who take a name at once one is told
            session.add(account)
    except sa.exc.IntegrityError as error:
        raise ConflictError(
            f"There is an account named {name!r} already.", code="name_taken", param="name"
        ) from error
    return account


def _checked(name: str) -> str:
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequestError(
            f"A name has 1 to {MAX_NAME_CHARS} printable characters.", code="invalid_name", param="name"
        )
    return name


def _key_of(name: str) -> str:
    """Return what is the same for all ways to write a name."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name.strip()).casefold())


def users_id() -> str:
    """Return a new id for whoever has an account, by which they are known to the log."""
    return f"{USER_PREFIX}{uuid.uuid4().hex}"


def retired(session: Session, user_ids: Collection[str]) -> set[str]:
    """Return those of some users who had an account's id, and are forgotten.

    Who is found to be there is not forgotten before the caller's transaction ends.
    """
    asked = {user_id for user_id in user_ids if user_id.startswith(USER_PREFIX)}
    if not asked:
        return set()
    rows = sa.select(Account.user_id).where(Account.user_id.in_(asked)).order_by(Account.user_id)
    return asked.difference(session.scalars(rows.with_for_update(read=True)))


def by_name(session: Session, name: str) -> Account | None:
    """Return the account of a name, however it is written."""
    return session.scalar(sa.select(Account).where(Account.name_key == _key_of(name)))


def get(session: Session, account: str) -> Account:
    """Return a person's account by its id or name.

    Raises
    ------
    NotFoundError
        Code ``account_not_found``.
    """
    found = session.get(Account, account) or by_name(session, account)
    if found is None or found.is_service:
        told = f"There is no account {account!r}; `everloop access list` shows them."
        raise NotFoundError(told, code="account_not_found")
    return found


def ensure(session: Session, name: str, role: Role, *, is_service: bool = False) -> Account:
    """Return the account of a name that is of this house, made if there is none; it can come in, in its role.

    Raises
    ------
    ConflictError
        Code ``name_taken`` where somebody else has the name.
    """
    found = by_name(session, name) or create(session, name, role, is_service=is_service)
    if found.issuer is not None or found.is_service != is_service:
        raise ConflictError(f"The account {name!r} is somebody else's.", code="name_taken", param="name")
    if is_service:
        found.role, found.disabled_at = role, None
    return found


def newest(session: Session) -> list[Account]:
    """Return the accounts of people, the newest first."""
    query = sa.select(Account).where(~Account.is_service).order_by(Account.created_at.desc(), Account.id)
    return list(session.scalars(query))


def sign_in(session: Session, name: str, password: str) -> Account:
    """Return the account of a name and password.

    Raises
    ------
    UnauthorizedError
        Code ``wrong_password``, whichever of the two was wrong, and where the account is disabled.
    """
    account = by_name(session, name)
    stored = account.password_hash if account is not None else None
    is_right = _matches(stored or _NOBODYS, password) and stored is not None
    if account is None or not is_right or account.disabled_at is not None:
        raise UnauthorizedError("The name or the password is wrong.", code="wrong_password")
    if _hasher.check_needs_rehash(stored or ""):
        account.password_hash = _hasher.hash(password)
    return account


def _matches(stored: str, password: str) -> bool:
    try:
        return _hasher.verify(stored, password)
    except (VerificationError, InvalidHashError):
        return False


def set_password(session: Session, account: Account, password: str) -> None:
    """Give an account a password; all its sessions end.

    Raises
    ------
    InvalidRequestError
        Code ``weak_password``.
    ForbiddenError
        Code ``no_password_here`` for whoever comes from an identity provider.
    """
    if account.issuer is not None:  # whoever may no longer sign in there must not come in here
        raise ForbiddenError("You sign in with your provider; here you have no password.", code="no_password_here")
    is_name = _key_of(password) == account.name_key
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS or is_name or len(set(password)) < 5:
        raise InvalidRequestError(
            f"A password has at least {MIN_PASSWORD_CHARS} characters, five of them different, and is not your "
            "name. A few unrelated words are a good one.",
            code="weak_password",
            param="password",
        )
    account.password_hash = _hasher.hash(password)
    end_sessions(session, account)


def forget_password(session: Session, account: Account) -> None:
    """Take a password away that somebody has lost, with all that it let in."""
    account.password_hash = None
    end_sessions(session, account)


def end_sessions(session: Session, account: Account) -> None:
    """Sign an account out everywhere, and make its unused links worthless."""
    session.execute(sa.delete(LoginSession).where(LoginSession.account_id == account.id))
    session.execute(sa.delete(OneTimeToken).where(OneTimeToken.account_id == account.id))


def set_role(session: Session, account: Account, role: Role) -> None:
    """Have an account do more or less from now on.

    Raises
    ------
    ConflictError
        Code ``last_admin``: somebody has to be able to undo it.
    """
    if role is not Role.ADMIN:
        _keep_an_admin(session, account)
    account.role = role


def disable(session: Session, account: Account) -> None:
    """Keep an account out: its sessions end, its keys are revoked.

    Raises
    ------
    ConflictError
        Code ``last_admin``.
    """
    _keep_an_admin(session, account)
    account.disabled_at = sa.func.now()
    end_sessions(session, account)
    revoked = sa.update(ApiKey).where(ApiKey.account_id == account.id, ApiKey.revoked_at.is_(None))
    session.execute(revoked.values(revoked_at=sa.func.now()))


def remove(session: Session, account: Account) -> None:
    """Delete an account, with its keys and sessions; what it said stays until it is forgotten.

    Raises
    ------
    ConflictError
        Code ``last_admin``.
    """
    _keep_an_admin(session, account)
    session.delete(account)


def enable(account: Account) -> None:
    """Let an account in again; its keys stay revoked."""
    account.disabled_at = None


def renew(session: Session, user_id: str) -> str | None:
    """Give whoever was forgotten another id, if it was an account's; return that."""
    account = session.scalar(sa.select(Account).where(Account.user_id == user_id))
    if account is None:
        return None
    account.user_id = users_id()
    return account.user_id


def _keep_an_admin(session: Session, account: Account) -> None:
    admins = sa.select(Account.id).where(
        Account.role == Role.ADMIN, Account.disabled_at.is_(None), ~Account.is_service
    )
    # Locked: of two who take each other's role away at the same moment one must find the other gone.
    if set(session.scalars(admins.with_for_update())) == {account.id}:
        raise ConflictError("This is the last admin; make somebody else one first.", code="last_admin")
