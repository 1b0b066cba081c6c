"""Signing in elsewhere: OpenID Connect's code flow with PKCE, at the one provider that the settings name.

Who comes from there is known by the provider's own id for them. An account that is here already is never taken over
by somebody of the same name or address there.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import urlencode

import anyio.to_thread
import httpx
import sqlalchemy as sa
from authlib.integrations.httpx_client import AsyncOAuth2Client
from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from sqlalchemy.orm import Session

from agent.access_api import changing, set_cookie
from deploy import audit
from feedback.addresses import client_address
from infra.access import accounts, sessions
from infra.access.gate import needs
from infra.access.roles import Role
from infra.access.tables import Account
from infra.access.tokens import digest, new_token
from infra.db import transaction
from infra.errors import ConflictError, EverloopError, NotFoundError, UnauthorizedError, UnavailableError
from infra.settings import Settings
from infra.text import CleanText

SCOPE = "openid profile email"
ALGORITHMS = ["RS256", "PS256", "ES256", "EdDSA"]  # never none, and nothing with a shared secret
TRY_S = 600.0
METADATA_S = 3600.0
REFRESHED_EVERY_S = 60.0
TIMEOUT_S = 10.0
CLOCK_SKEW_S = 60

Onwards = Annotated[CleanText, Query(max_length=500)]
Shown = Annotated[CleanText, Query(max_length=4000)]
router = APIRouter(prefix="/login/oidc", dependencies=[needs(None)], include_in_schema=False)
_metadata: dict[str, tuple[float, dict[str, Any]]] = {}


@router.get("")
async def begin(request: Request, next: Onwards = "/") -> Response:  # noqa: A002
    """Send the browser to the provider, with what it has to bring back."""
    settings: Settings = request.app.state.settings
    request.app.state.gate.limits.count_sign_in(client_address(request))
    metadata = await _provider(settings)
    verifier, nonce, browser = (secrets.token_urlsafe(48) for _ in range(3))

    def keep() -> str:
        with transaction(request.app.state.sessions) as session:
            kept: dict[str, Any] = {
                "verifier": verifier,
                "nonce": nonce,
                "browser": digest(browser).hex(),
                "next": next,
            }
            return sessions.offer(session, "oidc", TRY_S, **kept)

    state = await anyio.to_thread.run_sync(keep)
    async with _client(settings) as client:
        url, _ = client.create_authorization_url(
            metadata["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier
        )
    response = RedirectResponse(url, status_code=303)
    cookie, is_secure = _cookie(request)
    # Sent along when the provider sends the browser back; whoever was given somebody else's link has none.
    response.set_cookie(cookie, browser, max_age=int(TRY_S), secure=is_secure, httponly=True, samesite="lax")
    return response


@router.get("/callback")
async def come_back(request: Request, state: Shown = "", code: Shown = "") -> Response:
    """Take what the provider says of somebody, and sign them in."""
    try:
        request.app.state.gate.limits.count_sign_in(client_address(request))
        kept = await anyio.to_thread.run_sync(_kept, request, state)
        claims = await _claims(request.app.state.settings, code, kept)
        response = await anyio.to_thread.run_sync(_signed_in, request, claims, _own_page(kept["next"]))
    except EverloopError as error:
        response = RedirectResponse(f"/login?{urlencode({'problem': error.code})}", status_code=303)
    cookie, is_secure = _cookie(request)
    response.delete_cookie(cookie, secure=is_secure)
    return response


def _cookie(request: Request) -> tuple[str, bool]:
    gate = request.app.state.gate
    return f"{gate.cookie}-oidc", gate.is_secure


def _own_page(path: str) -> str:
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


def _client(settings: Settings, **options: Any) -> AsyncOAuth2Client:
    return AsyncOAuth2Client(
        settings.oidc_client_id,
        settings.oidc_client_secret,
        scope=SCOPE,
        redirect_uri=f"{settings.public_url}/login/oidc/callback",
        code_challenge_method="S256",
        timeout=TIMEOUT_S,
        **options,
    )


async def _provider(settings: Settings) -> dict[str, Any]:
    """Return what the provider tells of itself, with its keys.

    Raises
    ------
    NotFoundError
        Code ``no_provider``.
    UnavailableError
        Code ``provider_unavailable``.
    """
    issuer = settings.oidc_issuer
    if issuer is None:
        raise NotFoundError("No provider is known here: EVERLOOP_OIDC_ISSUER is not set.", code="no_provider")
    known = _metadata.get(issuer)
    if known is not None and time.monotonic() - known[0] < METADATA_S:
        return known[1]
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
            metadata: dict[str, Any] = (await client.get(url)).raise_for_status().json()
            if metadata["issuer"] != issuer:
                raise ValueError("another issuer")
            metadata["jwks"] = (await client.get(metadata["jwks_uri"])).raise_for_status().json()
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UnavailableError(f"{issuer} does not answer as a provider.", code="provider_unavailable") from error
    _metadata[issuer] = (time.monotonic(), metadata)
    return metadata


def _refresh(issuer: str) -> None:
    """Have what the provider tells of itself asked for anew, at most once a minute: anybody can make us fail."""
    known = _metadata.get(issuer)
    if known is not None and time.monotonic() - known[0] > REFRESHED_EVERY_S:
        del _metadata[issuer]


def _kept(request: Request, state: str) -> dict[str, Any]:
    """Return what was kept when this browser was sent away; once."""
    with transaction(request.app.state.sessions) as session:
        _, kept = sessions.use(session, "oidc", state)
    shown = request.cookies.get(_cookie(request)[0], "")
    if not secrets.compare_digest(digest(shown).hex(), kept["browser"]):
        raise UnauthorizedError("This sign-in was begun in another browser.", code="another_browser")
    return kept


async def _claims(settings: Settings, code: str, kept: dict[str, Any]) -> dict[str, Any]:
    """Return what the provider says, once its signature, its audience, its time and our nonce are right."""
    metadata = await _provider(settings)
    try:
        async with _client(settings) as client:
            token = await client.fetch_token(
                metadata["token_endpoint"],
                code=code,
                code_verifier=kept["verifier"],
                grant_type="authorization_code",
            )
        claims = jwt.decode(
            token["id_token"], KeySet.import_key_set(metadata["jwks"]), algorithms=ALGORITHMS
        ).claims
        rules: dict[str, Any] = {
            "iss": {"essential": True, "value": settings.oidc_issuer},
            "aud": {"essential": True, "value": settings.oidc_client_id},
            "nonce": {"essential": True, "value": kept["nonce"]},
            "exp": {"essential": True},
            "sub": {"essential": True},
        }
        jwt.JWTClaimsRegistry(leeway=CLOCK_SKEW_S, **rules).validate(claims)
    except (JoseError, httpx.HTTPError, KeyError, ValueError) as error:
        _refresh(settings.oidc_issuer or "")  # its keys may have changed
        raise UnauthorizedError("The provider's answer was not right.", code="provider_refused") from error
    except Exception as error:  # of the library, whose errors have no base that is told
        raise UnauthorizedError("The provider did not let them in.", code="provider_refused") from error
    return dict(claims)


def _signed_in(request: Request, claims: dict[str, Any], onwards: str) -> Response:
    settings: Settings = request.app.state.settings
    with changing(request) as session:
        account = _account(session, settings, claims)
        if account.disabled_at is not None:
            raise UnauthorizedError("This account is kept out.", code="account_disabled")
        token = sessions.begin(session, account, settings.session_days)
    response = RedirectResponse(onwards, status_code=303)
    set_cookie(request, response, token)
    return response


def _account(session: Session, settings: Settings, claims: dict[str, Any]) -> Account:
    """Return the account of somebody there, made on their first visit; its role is what the provider says today."""
    of_them = sa.and_(Account.issuer == settings.oidc_issuer, Account.subject == claims["sub"])
    account = session.scalar(sa.select(Account).where(of_them))
    role = role_of(settings, claims)
    if account is None:
        told = str(claims.get("preferred_username") or claims.get("email") or claims["sub"])
        name = "".join(each for each in told if each.isprintable())[:100] or "somebody"
        if accounts.by_name(session, name) is not None:
            name = f"{name} ({new_token()[:6]})"
        account = accounts.create(session, name, role, issuer=settings.oidc_issuer, subject=str(claims["sub"]))
        action = "account.added"
    elif account.role != role:
        with suppress(ConflictError):  # the last admin stays one, whatever the provider says
            accounts.set_role(session, account, role)
        action = "account.changed"
    else:
        return account
    reason = "as the identity provider says"
    audit.write(session, actor=account.id, action=action, subject=account.id, reason=reason, role=account.role)
    return account


def role_of(settings: Settings, claims: dict[str, Any]) -> Role:
    """Return the highest role that a claim stands for; everybody there is a user here.

    Examples
    --------
    >>> from pathlib import Path
    >>> role_of(Settings(home=Path("/"), oidc_roles={"ml-team": "operator"}), {"roles": ["staff", "ml-team"]})
    <Role.OPERATOR: 'operator'>
    """
    said = claims.get(settings.oidc_role_claim) or []
    values = [said] if isinstance(said, str) else list(said) if isinstance(said, list) else []
    known = settings.oidc_roles
    found = [Role(known[value]) for value in values if isinstance(value, str) and value in known]
    return max([Role.USER, *found], key=list(Role).index)
