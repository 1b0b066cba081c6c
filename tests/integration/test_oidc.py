"""Signing in elsewhere, at a provider that speaks OpenID Connect: a small one of our own, with real keys."""

import hashlib
import hmac
import json
import threading
import time
from base64 import urlsafe_b64encode
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.testclient import TestClient
from joserfc import jwt
from joserfc.jwk import RSAKey

from agent import oidc
from infra.access import gate
from tests.integration.test_access import House
from tests.tamper import free_port

SECRET = "known to both"
ROLES = {"ml-team": "operator", "everybody": "user", "admins": "admin"}


class Provider:
    """What a provider does for a code flow with PKCE; `lies` changes the claims of its next tokens."""

    def __init__(self):
        self.port = free_port()
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.key = self.signing_key = RSAKey.generate_key(2048, {"kid": "1", "use": "sig", "alg": "RS256"})
        self.person = {"sub": "7", "preferred_username": "ada"}
        self.lies = {}
        self.asked = {}
        app = FastAPI()
        app.get("/.well-known/openid-configuration")(self.metadata)
        app.get("/jwks")(lambda: {"keys": [self.key.as_dict(private=False)]})
        app.get("/authorize")(self.authorize)
        app.post("/token")(self.token)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))

    def sign(self, claims):
        return jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.signing_key)

    def metadata(self):
        names = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "jwks"}
        return {"issuer": self.issuer, **{name: f"{self.issuer}/{path}" for name, path in names.items()}}

    def authorize(self, state: str, nonce: str, code_challenge: str, client_id: str, redirect_uri: str):
        self.asked = {"nonce": nonce, "challenge": code_challenge, "client_id": client_id}
        return RedirectResponse(f"{redirect_uri}?state={state}&code=c0de")

    async def token(self, request: Request):
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        verified = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = urlsafe_b64encode(verified).decode().rstrip("=")
        if form["code"] != "c0de" or challenge != self.asked["challenge"]:
            return JSONResponse({"error": "invalid_grant"}, status_code=400)
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": self.asked["client_id"], "nonce": self.asked["nonce"]}
        claims |= {"iat": now, "exp": now + 300, **self.person, **self.lies}
        token = self.sign(claims)
        return {"access_token": "x", "token_type": "Bearer", "id_token": token}


@pytest.fixture(scope="module")
def running():
    provider = Provider()
    threading.Thread(target=provider.server.run, daemon=True).start()
    while not provider.server.started:
        time.sleep(0.01)
    yield provider
    provider.server.should_exit = True


@pytest.fixture
def provider(running):
    running.lies, running.signing_key = {}, running.key
    running.person = {"sub": "7", "preferred_username": "ada"}
    oidc._metadata.clear()
    return running


@pytest.fixture
def house(database, tmp_path, monkeypatch, provider):
    monkeypatch.setattr(gate, "KNOWN_FOR_S", 0.0)
    there = {"oidc_issuer": provider.issuer, "oidc_client_secret": SECRET, "oidc_roles": ROLES}
    house = House(database, tmp_path, **there)
    with TestClient(house.app):
        yield house


def sign_in(house, provider, client=None, begun_by=None, onwards="/c/1"):
    """Go to the provider and come back, as a browser would; return where that led."""
    client = client or house.stranger()
    begun = (begun_by or client).get(f"/login/oidc?next={onwards}", follow_redirects=False)
    there = urlsplit(begun.headers["location"])
    asked = {name: values[0] for name, values in parse_qs(there.query).items()}
    assert asked["code_challenge_method"] == "S256" and "openid" in asked["scope"]
    wanted = ("state", "nonce", "code_challenge", "client_id", "redirect_uri")
    back = urlsplit(provider.authorize(**{name: asked[name] for name in wanted}).headers["location"])
    assert back.path == "/login/oidc/callback"
    return client, client.get(f"{back.path}?{back.query}", follow_redirects=False)


def refused(answer):
    assert answer.status_code == 303 and answer.headers["location"].startswith("/login?problem=")
    return answer.headers["location"].partition("=")[2]


def test_who_is_known_there_comes_in_here_and_is_the_same_the_next_time(house, provider):
    client, answer = sign_in(house, provider)
    assert (answer.status_code, answer.headers["location"]) == (303, "/c/1")
    first = client.get("/v1/session").json()
    assert first["account"] | {"name": "ada", "role": "user"} == first["account"]
    assert first["provider"] == provider.issuer
    provider.person["preferred_username"] = "ada lovelace"
    again, _ = sign_in(house, provider)
    assert again.get("/v1/session").json()["account"]["id"] == first["account"]["id"]


def test_the_role_is_what_the_provider_says_today(house, provider):
    provider.person["roles"] = ["everybody", "ml-team", "unknown here"]
    client, _ = sign_in(house, provider)
    assert client.get("/v1/deployment").status_code == 200
    provider.person["roles"] = "everybody"
    sign_in(house, provider)
    assert client.get("/v1/deployment").status_code == 403


def test_nobody_takes_over_an_account_by_its_name(house, provider):
    own = house.account("ada")
    client, _ = sign_in(house, provider)
    told = client.get("/v1/session").json()["account"]
    assert told["id"] != own.id and told["name"].startswith("ada (")


def test_whoever_is_kept_out_here_stays_out(house, provider):
    client, _ = sign_in(house, provider)
    boss = house.browser(house.account("boss", "admin"))
    path = f"/v1/accounts/{client.get('/v1/session').json()['account']['id']}"
    assert boss.patch(path, json={"disabled": True, "reason": "left"}).status_code == 200
    assert refused(sign_in(house, provider)[1]) == "account_disabled"


@pytest.mark.parametrize(
    "lies",
    [
        {"iss": "http://elsewhere"},
        {"aud": "another client"},
        {"nonce": "another"},
        {"exp": 1_000_000_000},
        {"sub": None},
    ],
)
def test_a_token_that_is_not_for_this_sign_in_lets_nobody_in(house, provider, lies):
    provider.lies = lies
    client, answer = sign_in(house, provider)
    assert refused(answer) == "provider_refused"
    assert client.get("/v1/me").status_code == 401


def test_a_token_signed_by_somebody_else_lets_nobody_in(house, provider):
    provider.signing_key = RSAKey.generate_key(2048, {"kid": "1"})
    assert refused(sign_in(house, provider)[1]) == "provider_refused"


def test_a_token_that_is_not_signed_or_signed_with_what_everybody_knows_lets_nobody_in(
    house, provider, monkeypatch
):
    def part(value):
        return urlsafe_b64encode(value).decode().rstrip("=")

    def unsigned(claims):
        return f"{part(json.dumps({'alg': 'none'}).encode())}.{part(json.dumps(claims).encode())}."

    public = provider.key.as_pem(private=False)

    def signed_with_the_public_key(claims):
        head = f"{part(json.dumps({'alg': 'HS256', 'kid': '1'}).encode())}.{part(json.dumps(claims).encode())}"
        return f"{head}.{part(hmac.digest(public, head.encode(), 'sha256'))}"

    for sign in (unsigned, signed_with_the_public_key):
        monkeypatch.setattr(provider, "sign", sign)
        assert refused(sign_in(house, provider)[1]) == "provider_refused"


def test_whoever_comes_from_there_has_no_password_here(house, provider):
    client, _ = sign_in(house, provider)
    answer = client.put("/v1/session/password", json={"password": "a quiet brown harbour"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_password_here")


def test_the_last_admin_stays_one_whatever_the_provider_says(house, provider):
    provider.person["roles"] = ["admins", {"nested": "values"}]
    client, _ = sign_in(house, provider)
    assert client.get("/v1/accounts").status_code == 200
    provider.person["roles"] = []
    again, answer = sign_in(house, provider)
    assert answer.headers["location"] == "/c/1" and again.get("/v1/accounts").status_code == 200


def test_the_provider_is_not_asked_again_and_again_by_whoever_fails(house, provider):
    begun = [house.stranger().get("/login/oidc", follow_redirects=False).status_code for _ in range(12)]
    assert begun == [303] * 10 + [429] * 2


def test_a_sign_in_that_another_browser_began_is_not_ended_here(house, provider):
    client, answer = sign_in(house, provider, begun_by=house.stranger())
    assert refused(answer) == "another_browser" and client.get("/v1/me").status_code == 401


def test_an_answer_is_good_once(house, provider):
    client = house.stranger()
    begun = client.get("/login/oidc", follow_redirects=False)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(begun.headers["location"]).query).items()}
    wanted = ("state", "nonce", "code_challenge", "client_id", "redirect_uri")
    back = provider.authorize(**{name: asked[name] for name in wanted}).headers["location"]
    kept = dict(client.cookies)
    path = back.partition("testserver")[2]
    assert client.get(path, follow_redirects=False).headers["location"] == "/"
    client.cookies.update(kept)
    assert refused(client.get(path, follow_redirects=False)) == "link_used"


@pytest.mark.parametrize("onwards", ["https://evil.example/", "//evil.example", "/%5Cevil.example"])
def test_nobody_is_sent_on_to_another_site(house, provider, onwards):
    _, answer = sign_in(house, provider, onwards=onwards)
    assert answer.headers["location"] == "/"


def test_without_a_provider_there_is_no_such_way(database, tmp_path):
    house = House(database, tmp_path)
    with TestClient(house.app):
        answer = house.stranger().get("/login/oidc")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_provider")
