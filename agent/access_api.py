"""``/v1/session``, ``/v1/keys`` and ``/v1/accounts``: signing in, one's keys, and who may do what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from deploy import audit
from deploy.api import Reasoned
from feedback.addresses import client_address
from infra.access import accounts, keys, sessions
from infra.access.gate import SignedIn, caller_of, needs
from infra.access.roles import Caller, Role
from infra.access.tables import Account
from infra.db import transaction
from infra.errors import ConflictError, ForbiddenError, InvalidRequestError
from infra.text import CleanText

public = APIRouter(prefix="/v1", tags=["access"], dependencies=[needs(None)])
router = APIRouter(prefix="/v1", tags=["access"], dependencies=[needs(Role.USER)])
admin = APIRouter(prefix="/v1", tags=["access"], dependencies=[needs(Role.ADMIN)])
MaybeCaller = Annotated[Caller | None, Depends(caller_of)]
ROTATION_GRACE_S = 3600.0


class Strict(BaseModel):
    """A body with nothing unknown in it."""

    model_config = ConfigDict(extra="forbid")


class SignIn(Strict):
    """A name and a password, or the token of a link."""

    name: CleanText | None = Field(None, max_length=accounts.MAX_NAME_CHARS)
    password: str | None = Field(None, max_length=accounts.MAX_PASSWORD_CHARS)
    link: str | None = Field(None, max_length=128)


class AccountView(BaseModel):
    """An account, as it and admins see it."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    role: Role
    user: str = Field(validation_alias="user_id", description="Who they are to chats and feedback.")
    created_at: datetime
    disabled_at: datetime | None
    has_password: bool = False
    issuer: str | None


class SessionView(BaseModel):
    """Who is signed in, and how one can."""

    access: Literal["accounts", "open"]
    account: AccountView | None
    provider: str | None = Field(description="Where one can sign in with an account of another house.")


class NewPassword(Strict):
    """A password, and the one before where there was one."""

    password: str = Field(max_length=accounts.MAX_PASSWORD_CHARS)
    current: str | None = Field(None, max_length=accounts.MAX_PASSWORD_CHARS)


class NewKey(Strict):
    """What a key is for, and what it may do."""

    name: CleanText = Field(min_length=1, max_length=128)
    role: Role = Role.USER
    acts_for_others: bool = False
    days: float | None = Field(90, gt=0, le=3650, description="Until it ends; null for a key without an end.")
    requests_per_minute: int | None = Field(None, ge=1)


class KeyView(BaseModel):
    """A key, without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    role: Role
    acts_for_others: bool
    requests_per_minute: int | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


class IssuedKey(KeyView):
    """A key with its secret, which is shown this once."""

    secret: str


class NewAccount(Reasoned):
    """Somebody who is to be let in, and why."""

    name: CleanText = Field(min_length=1, max_length=accounts.MAX_NAME_CHARS)
    role: Role = Role.USER


class ChangedAccount(Reasoned):
    """What becomes different, and why."""

    role: Role | None = None
    disabled: bool | None = None


class NewLink(Reasoned):
    """Why somebody needs a link."""

    reset: bool = Field(False, description="Take their password away, which they have forgotten; all sessions end.")


class Link(BaseModel):
    """A way in that can be used once."""

    url: str
    hours: float


@contextmanager
def changing(request: Request) -> Iterator[Session]:
    """Open a transaction that changes who may do what; from then on the gate reads it anew."""
    with transaction(request.app.state.sessions) as session:
        audit.from_address(session, client_address(request))
        yield session
    request.app.state.gate.forget()


def signed_in_response(session: Session, request: Request, account: Account, status: int = 200) -> Response:
    """Begin a session and answer with its cookie."""
    settings = request.app.state.settings
    token = sessions.begin(session, account, settings.session_days)
    response = JSONResponse(_session_view(request, account).model_dump(mode="json"), status_code=status)
    set_cookie(request, response, token)
    return response


def set_cookie(request: Request, response: Response, token: str) -> None:
    """Give the browser its session: no script reads it, no other site sends it along with what it does."""
    settings, gate = request.app.state.settings, request.app.state.gate
    response.set_cookie(
        gate.cookie,
        token,
        max_age=int(settings.session_days * 86_400),
        secure=gate.is_secure,
        httponly=True,
        samesite="lax",
    )


def _session_view(request: Request, account: Account | None) -> SessionView:
    settings = request.app.state.settings
    shown = None if account is None else _view(account)
    return SessionView(access=settings.access, account=shown, provider=settings.oidc_issuer)


def _view(account: Account) -> AccountView:
    found = AccountView.model_validate(account)
    found.has_password = account.password_hash is not None
    return found


def _own(session: Session, caller: Caller) -> Account:
    """Return the account of who asks in person: no key makes keys, or changes a password."""
    if caller.account_id is None:
        raise ConflictError(
            "Access is open here, without accounts; set EVERLOOP_ACCESS=accounts.", code="access_is_open"
        )
    if caller.session_digest is None:
        raise ForbiddenError("Sign in with a browser for this; a key cannot do it.", code="session_needed")
    return accounts.get(session, caller.account_id)


@public.get("/session")
def get_session(request: Request, caller: MaybeCaller) -> SessionView:
    """Return who is signed in, if anybody is."""
    if caller is None or caller.account_id is None:
        return _session_view(request, None)
    with transaction(request.app.state.sessions) as session:
        return _session_view(request, accounts.get(session, caller.account_id))


@public.post("/session", response_model=SessionView)
def sign_in(body: SignIn, request: Request) -> Response:
    """Sign a browser in, by name and password or by a link that can be used once."""
    request.app.state.gate.limits.count_sign_in(client_address(request), body.name)
    if body.link is None and (body.name is None or body.password is None):
        raise InvalidRequestError("Give a name and a password, or a link.", param="name")
    with transaction(request.app.state.sessions) as session:
        if body.link is not None:
            account, _ = sessions.use(session, "link", body.link)
            assert account is not None
        else:
            account = accounts.sign_in(session, body.name or "", body.password or "")
        return signed_in_response(session, request, account)


@router.delete("/session", status_code=204)
def sign_out(caller: SignedIn, request: Request) -> Response:
    """Sign this browser out."""
    if caller.session_digest is not None:
        with changing(request) as session:
            sessions.end(session, caller.session_digest)
    response = Response(status_code=204)
    gate = request.app.state.gate
    response.delete_cookie(gate.cookie, secure=gate.is_secure)
    return response


@router.put("/session/password", response_model=SessionView)
def set_password(body: NewPassword, caller: SignedIn, request: Request) -> Response:
    """Set your password; you are signed out everywhere else."""
    with changing(request) as session:
        account = _own(session, caller)
        if account.password_hash is not None:
            request.app.state.gate.limits.count_sign_in(client_address(request), account.name)
            accounts.sign_in(session, account.name, body.current or "")
        accounts.set_password(session, account, body.password)
        audit.write(session, actor=account.id, action="password.set", subject=account.id, reason="by its owner")
        return signed_in_response(session, request, account)


@router.get("/keys")
def list_keys(caller: SignedIn, request: Request) -> list[KeyView]:
    """List your keys, the newest first."""
    with transaction(request.app.state.sessions) as session:
        return [KeyView.model_validate(key) for key in keys.of(session, _own(session, caller))]


@router.post("/keys", status_code=201)
def issue_key(body: NewKey, caller: SignedIn, request: Request) -> IssuedKey:
    """Make a key of yours; its secret is shown this once."""
    with changing(request) as session:
        account = _own(session, caller)
        key, secret = keys.issue(session, account, **body.model_dump())
        _note_key(session, account, "key.issued", key.id, "by its owner")
        session.refresh(key)
        return IssuedKey(**KeyView.model_validate(key).model_dump(), secret=secret)


@router.post("/keys/{key_id}/rotate", status_code=201)
def rotate_key(
    key_id: CleanText,
    caller: SignedIn,
    request: Request,
    grace_s: Annotated[float, Query(ge=0, le=86_400 * 7)] = ROTATION_GRACE_S,
) -> IssuedKey:
    """Make a key like one of yours, which ends after `grace_s` seconds: in between both are good."""
    with changing(request) as session:
        account = _own(session, caller)
        key, secret = keys.rotate(session, keys.get(session, key_id, account), grace_s)
        _note_key(session, account, "key.rotated", key.id, f"in place of {key_id}")
        session.refresh(key)
        return IssuedKey(**KeyView.model_validate(key).model_dump(), secret=secret)


@router.delete("/keys/{key_id}", status_code=204)
def revoke_key(key_id: CleanText, caller: SignedIn, request: Request) -> None:
    """End a key of yours."""
    with changing(request) as session:
        account = _own(session, caller)
        keys.revoke(keys.get(session, key_id, account))
        _note_key(session, account, "key.revoked", key_id, "by its owner")


# The audit log, which nobody can change, names people who act for themselves by their account's id only.
def _note_key(session: Session, account: Account, action: str, key_id: str, reason: str) -> None:
    audit.write(session, actor=account.id, action=action, subject=key_id, reason=reason)


@admin.get("/accounts")
def list_accounts(request: Request) -> list[AccountView]:
    """List all accounts, the newest first."""
    with transaction(request.app.state.sessions) as session:
        return [_view(account) for account in accounts.newest(session)]


@admin.post("/accounts", status_code=201)
def add_account(body: NewAccount, caller: SignedIn, request: Request) -> AccountView:
    """Let somebody in; a link lets them sign in for the first time."""
    with changing(request) as session:
        account = accounts.create(session, body.name, body.role)
        _note(session, caller, "account.added", account, body.reason, role=body.role)
        session.refresh(account)
        return _view(account)


@admin.patch("/accounts/{account_id}")
def change_account(account_id: CleanText, body: ChangedAccount, caller: SignedIn, request: Request) -> AccountView:
    """Change what somebody may do, or keep them out."""
    with changing(request) as session:
        account = accounts.get(session, account_id)
        if body.role is not None:
            accounts.set_role(session, account, body.role)
        if body.disabled is not None:
            accounts.disable(session, account) if body.disabled else accounts.enable(account)
        changes: dict[str, Any] = body.model_dump(exclude={"reason"}, exclude_none=True, mode="json")
        _note(session, caller, "account.changed", account, body.reason, **changes)
        session.flush()
        session.refresh(account)
        return _view(account)


@admin.post("/accounts/{account_id}/link", status_code=201)
def make_link(account_id: CleanText, body: NewLink, caller: SignedIn, request: Request) -> Link:
    """Make a link by which somebody signs in once, such as for the first time."""
    with changing(request) as session:
        account = accounts.get(session, account_id)
        if body.reset:
            accounts.forget_password(session, account)
        url = sessions.link(session, account, request.app.state.settings.public_url)
        _note(session, caller, "account.link", account, body.reason, reset=body.reset)
        return Link(url=url, hours=sessions.LINK_HOURS)


def _note(session: Session, caller: Caller, action: str, account: Account, reason: str, **details: Any) -> None:
    audit.write(session, actor=caller.name, action=action, subject=account.id, reason=reason, **details)
