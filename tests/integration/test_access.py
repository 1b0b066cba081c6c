"""Who may come in, and what they may do: accounts, sessions, keys, roles, limits."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient

from agent.app import build_app
from agent.guard import Guard
from deploy import audit
from feedback import episodes, erasure, users
from feedback.episodes import Recording
from feedback.tables import Feedback, User
from infra.access import accounts, gate, keys, sessions
from infra.access.gate import Needs
from infra.access.roles import Role
from infra.access.tables import Account, ApiKey, LoginSession, OneTimeToken
from infra.errors import ConflictError
from infra.settings import Settings

PASSWORD = "a quiet brown harbour"
NOT_ROUTES = {"/openapi.json", "/static", "/static/deploy"}


class House:
    """An API on tables of its own, and the people who come to it."""

    def __init__(self, database, tmp_path, **options):
        url = database.kw["bind"].url.render_as_string(hide_password=False)
        own = {"database_url": url, "engine_url": "http://127.0.0.1:9", "public_url": "http://testserver"}
        own["sign_ins_per_minute"] = 10  # whatever the stack of the other tests was given
        self.database = database
        self.settings = Settings(home=tmp_path, **(own | options))
        self.app = build_app(self.settings)

    def account(self, name, role=Role.USER, password=None):
        with self.database.begin() as session:
            account = accounts.create(session, name, role)
            if password:
                accounts.set_password(session, account, password)
            return account

    def find(self, name):
        with self.database() as session:
            return accounts.get(session, name)

    def browser(self, account):
        """Return a client that is signed in."""
        with self.database.begin() as session:
            token = sessions.begin(session, session.merge(account), days=1)
        client = self.stranger()
        client.cookies.set(gate.cookie_name(self.settings), token)
        return client

    def program(self, account, **options):
        """Return a client with a key of an account, and the key's id."""
        with self.database.begin() as session:
            key, secret = keys.issue(session, session.merge(account), "a program", **options)
        client = self.stranger()
        client.headers["Authorization"] = f"Bearer {secret}"
        return client, key.id

    def stranger(self):
        return TestClient(self.app)


@pytest.fixture
def house(database, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "KNOWN_FOR_S", 0.0)
    house = House(database, tmp_path)
    with TestClient(house.app) as house.inside:  # what is written together is, in this one's event loop
        yield house


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def routes(app):
    """Return all routes that FastAPI looks after, and the paths of the others."""
    found = list(iter_route_contexts(app.routes))
    of_api = [route for route in found if isinstance(route.original_route, APIRoute)]
    return of_api, {route.original_route.path for route in found if route not in of_api}


def role_of(route):
    """Return the highest role that a route asks for, or "nobody said"."""
    found = [each.call.role for each in route.dependant.dependencies if isinstance(each.call, Needs)]
    order = [None, *Role]
    return max(found, key=order.index) if found else "nobody said"


def test_every_route_says_which_role_it_needs(house):
    found, others = routes(house.app)
    assert len(found) > 60 and others == NOT_ROUTES
    assert [route.path for route in found if role_of(route) == "nobody said"] == []


def test_what_everybody_may_is_little(house):
    public = {route.path for route in routes(house.app)[0] if role_of(route) is None}
    probes = {"/healthz", "/readyz", "/readyz/feedback"}  # which tell whether it is well, and nothing else
    assert public == {"/login", "/login/oidc", "/login/oidc/callback", "/v1/session"} | probes


@pytest.mark.parametrize("role", [None, *Role])
def test_each_role_may_what_it_may_and_no_more(house, role):
    """Every route is tried as every role; one that is refused is refused before anything else is looked at."""
    client = house.stranger() if role is None else house.browser(house.account("somebody", role))
    order = list(Role)
    for route in routes(house.app)[0]:
        needed = role_of(route)
        path = route.path
        for name in route.original_route.param_convertors:
            path = path.replace(f"{{{name}}}", "1")
        if needed is None or path == "/operate/live":  # which never ends
            continue
        for method in route.methods - {"HEAD"}:
            if (method, path) == ("DELETE", "/v1/session"):
                continue
            answer = client.request(method, path, json={} if method in ("POST", "PUT", "PATCH") else None)
            if role is None:
                assert answer.status_code == 401, (method, path)
            elif order.index(role) < order.index(needed):
                assert answer.status_code == 403, (method, path)
            else:
                assert answer.status_code not in (401,), (method, path)
                assert answer.status_code != 403 or "role_needed" not in answer.text, (method, path)


def test_a_page_sends_a_stranger_to_where_one_signs_in(house):
    answer = house.stranger().get("/operate/audit", headers={"Accept": "text/html"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Foperate%2Faudit")
    assert code(house.stranger().get("/v1/me")) == (401, "not_signed_in")


def test_a_link_signs_in_once(house):
    owner = house.account("owner", Role.ADMIN)
    with house.database.begin() as session:
        token = sessions.offer(session, "link", 60, session.merge(owner))
        over = sessions.offer(session, "link", -1, session.merge(owner))
    # Before anybody signs in, which sweeps out what is over.
    assert code(house.stranger().post("/v1/session", json={"link": over})) == (401, "link_used")
    client = house.stranger()
    answer = client.post("/v1/session", json={"link": token})
    assert answer.json()["account"]["name"] == "owner"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and token not in cookie
    assert client.get("/v1/me").json()["user"] == owner.user_id
    for used in (token, over, "never was"):
        assert code(house.stranger().post("/v1/session", json={"link": used})) == (401, "link_used")


def test_of_two_who_use_a_link_at_once_one_comes_in(house):
    owner = house.account("owner", Role.ADMIN)
    with house.database.begin() as session:
        token = sessions.offer(session, "link", 60, session.merge(owner))
    seen = []

    def use():
        seen.append(house.stranger().post("/v1/session", json={"link": token}).status_code)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [200] + [401] * 5


def test_a_password_lets_in_and_a_wrong_one_tells_nothing(house):
    house.account("Ada", password=PASSWORD)
    client = house.stranger()
    assert client.post("/v1/session", json={"name": " ada ", "password": PASSWORD}).status_code == 200
    assert client.get("/v1/session").json()["account"]["name"] == "Ada"
    wrong = [{"name": "Ada", "password": "a quiet brown harbor"}, {"name": "Bob", "password": PASSWORD}]
    answers = [house.stranger().post("/v1/session", json=body) for body in wrong]
    assert code(answers[0]) == (401, "wrong_password") and answers[0].json() == answers[1].json()


def test_passwords_cannot_be_tried_for_long(house):
    house.account("ada", password=PASSWORD)
    client = house.stranger()
    tried = [client.post("/v1/session", json={"name": "ada", "password": f"no {n}"}) for n in range(12)]
    assert [answer.status_code for answer in tried] == [401] * 10 + [429] * 2
    assert int(tried[-1].headers["retry-after"]) > 0
    assert code(client.post("/v1/session", json={"name": "ada", "password": PASSWORD})) == (
        429,
        "too_many_requests",
    )


def test_nobody_keeps_others_out_by_trying(house):
    house.account("ada", password=PASSWORD)
    stranger, ada = (TestClient(house.app, client=(address, 50000)) for address in ("198.51.100.7", "203.0.113.9"))
    tried = [stranger.post("/v1/session", json={"name": "ada", "password": f"no {n}"}) for n in range(12)]
    assert tried[-1].status_code == 429
    assert ada.post("/v1/session", json={"name": "ada", "password": PASSWORD}).is_success


@pytest.mark.parametrize("password", ["short", " ADA of the Harbour", "abcd" * 10, "ab cd ef gh " * 100])
def test_a_weak_password_is_refused(house, password):
    client = house.browser(house.account("Ada of the harbour"))
    assert client.put("/v1/session/password", json={"password": password}).status_code == 400


def test_whoever_sets_a_password_signs_out_everybody_else(house):
    ada = house.account("ada", password=PASSWORD)
    here, there = house.browser(ada), house.browser(ada)
    wish = {"password": "seven green umbrellas"}
    assert code(here.put("/v1/session/password", json=wish)) == (401, "wrong_password")
    assert here.put("/v1/session/password", json={**wish, "current": PASSWORD}).status_code == 200
    assert here.get("/v1/me").status_code == 200 and there.get("/v1/me").status_code == 401
    with house.database() as session:
        stored = session.get_one(Account, ada.id).password_hash
        assert stored.startswith("$argon2id$") and "umbrellas" not in stored


def test_signing_out_ends_the_session_here_and_on_the_server(house):
    client = house.browser(house.account("ada"))
    kept = dict(client.cookies)
    assert client.delete("/v1/session").status_code == 204
    client.cookies.update(kept)
    assert client.get("/v1/me").status_code == 401
    with house.database() as session:
        assert session.scalars(sa.select(LoginSession)).all() == []


def test_a_session_ends_by_time(house):
    client = house.browser(house.account("ada"))
    with house.database.begin() as session:
        session.execute(sa.update(LoginSession).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert client.get("/v1/me").status_code == 401


def test_a_key_is_shown_once_used_rotated_and_revoked(house):
    ada = house.account("ada")
    browser = house.browser(ada)
    made = browser.post("/v1/keys", json={"name": "my script"}).json()
    assert made["secret"].startswith("everloop_") and made["last_used_at"] is None
    with house.database() as session:
        assert made["secret"] not in str(session.get_one(ApiKey, made["id"]).__dict__)
    program = house.stranger()
    program.headers["Authorization"] = f"Bearer {made['secret']}"
    assert program.get("/v1/me").json()["user"] == ada.user_id
    (shown,) = browser.get("/v1/keys").json()
    assert shown["last_used_at"] and "secret" not in shown
    fresh = browser.post(f"/v1/keys/{made['id']}/rotate?grace_s=0", json={}).json()
    assert program.get("/v1/me").status_code == 401, "no grace was given"
    program.headers["Authorization"] = f"Bearer {fresh['secret']}"
    assert program.get("/v1/me").status_code == 200
    assert browser.delete(f"/v1/keys/{fresh['id']}").status_code == 204
    assert program.get("/v1/me").status_code == 401


def test_a_key_does_no_more_than_its_role_and_its_account(house):
    boss = house.account("boss", Role.ADMIN)
    small, _ = house.program(boss)
    assert code(small.get("/v1/deployment")) == (403, "role_needed")
    large, _ = house.program(boss, role=Role.OPERATOR)
    assert large.get("/v1/deployment").status_code == 200
    with house.database.begin() as session:
        accounts.set_role(session, accounts.create(session, "another", Role.ADMIN), Role.ADMIN)
        accounts.set_role(session, session.merge(boss), Role.USER)
    assert code(large.get("/v1/deployment")) == (403, "role_needed")
    browser = house.browser(house.account("ada"))
    for asked in ({"role": "operator"}, {"acts_for_others": True}):
        assert code(browser.post("/v1/keys", json={"name": "more", **asked})) == (403, "role_needed")


def test_a_key_makes_no_keys_and_sets_no_password(house):
    program, key_id = house.program(house.account("boss", Role.ADMIN), role=Role.ADMIN)
    refused = (403, "session_needed")
    assert code(program.post("/v1/keys", json={"name": "x"})) == refused
    assert code(program.post(f"/v1/keys/{key_id}/rotate", json={})) == refused
    assert code(program.put("/v1/session/password", json={"password": PASSWORD})) == refused


def test_nobody_speaks_for_somebody_else(house):
    ada = house.browser(house.account("ada"))
    for named in ("ben", house.account("ben").user_id):
        assert code(ada.get("/v1/me", headers={"X-Everloop-User": named})) == (403, "not_you")
        signal = {"kind": "thumb", "value": 1, "episode_id": "ep_1", "user": named, "idempotency_key": "k"}
        assert code(ada.post("/v1/feedback", json=signal)) == (403, "not_you")
        (item,) = ada.post("/v1/feedback/batch", json={"signals": [signal]}).json()["results"]
        assert item["error"]["code"] == "not_you"
        chat = {"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "user": named}
        assert code(ada.post("/v1/chat/completions", json=chat)) == (403, "not_you")


def test_a_server_of_somebodys_speaks_for_its_users(house):
    server, _ = house.program(house.account("shop", Role.ADMIN), acts_for_others=True)
    assert server.get("/v1/me", headers={"X-Everloop-User": "customer 7"}).json()["user"] == "customer 7"
    assert code(server.delete("/v1/me")) == (400, "user_required")


def test_what_is_somebodys_is_nobody_elses(house):
    ada, ben = (house.browser(house.account(name)) for name in ("ada", "ben"))
    made = ada.post("/v1/conversations", json={"title": "mine"}).json()["id"]
    assert ada.get(f"/v1/conversations/{made}").status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/turns")):
        assert ben.request(method, f"/v1/conversations/{made}{path}").status_code == 404
    assert ben.get("/v1/conversations").json()["data"] == []


def test_whoever_only_chats_sends_no_verdicts_of_machines_and_asks_no_release_by_name(house):
    ada = house.browser(house.account("ada"))
    verdict = {"kind": "judge", "score": 1.0, "episode_id": "ep_1", "user": "gpt", "idempotency_key": "k"}
    assert code(ada.post("/v1/feedback", json=verdict)) == (403, "role_needed")
    chat = {"model": "r1-untested", "messages": [{"role": "user", "content": "Hi"}]}
    assert code(ada.post("/v1/chat/completions", json=chat)) == (403, "role_needed")


def test_whoever_is_forgotten_is_somebody_else_from_then_on(house):
    account = house.account("ada")
    with house.database.begin() as session:
        users.ensure(session, [account.user_id])
    ada = house.browser(account)
    assert ada.delete("/v1/me").status_code == 202
    told = ada.get("/v1/session").json()["account"]
    assert told["name"] == "ada" and told["user"] != account.user_id
    assert code(ada.get("/v1/me", headers={"X-Everloop-User": account.user_id})) == (403, "not_you")


def test_admins_decide_who_comes_in_and_it_is_audited(house):
    boss = house.account("boss", Role.ADMIN)
    browser = house.browser(boss)
    made = browser.post("/v1/accounts", json={"name": "ann", "role": "rater", "reason": "rates on Mondays"}).json()
    assert code(browser.post("/v1/accounts", json={"name": "ANN", "reason": "again"})) == (409, "name_taken")
    url = browser.post(f"/v1/accounts/{made['id']}/link", json={"reason": "her first day"}).json()["url"]
    assert "#" in url and "?" not in url
    ann = house.stranger()
    assert ann.post("/v1/session", json={"link": url.partition("#")[2]}).status_code == 200
    program, _ = house.program(house.find("ann"))
    assert program.get("/v1/me").status_code == 200
    browser.patch(f"/v1/accounts/{made['id']}", json={"disabled": True, "reason": "left"}).raise_for_status()
    assert ann.get("/v1/me").status_code == program.get("/v1/me").status_code == 401
    with house.database() as session:
        told = [(entry.actor, entry.action, entry.subject) for entry in audit.newest(session, 3)]
    assert told == [("boss", f"account.{act}", made["id"]) for act in ("changed", "link", "added")]


def test_somebody_stays_who_can_undo_it(house):
    boss = house.account("boss", Role.ADMIN)
    browser = house.browser(boss)
    for change in ({"role": "user"}, {"disabled": True}):
        assert code(browser.patch(f"/v1/accounts/{boss.id}", json={**change, "reason": "x"})) == (409, "last_admin")
    other = house.account("other", Role.ADMIN)
    outcomes = []

    def step_down(account):
        try:
            with house.database.begin() as session:
                accounts.set_role(session, session.merge(account), Role.USER)
            outcomes.append("done")
        except ConflictError as error:
            outcomes.append(error.code)

    second = threading.Thread(target=step_down, args=(other,))
    with house.database.begin() as session:  # the first is not done yet when the second begins
        accounts.set_role(session, session.merge(boss), Role.USER)
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive() and outcomes == [], "it has to wait for the first"
    second.join()
    assert outcomes == ["last_admin"]


def test_a_lost_password_is_taken_away_with_all_that_it_let_in(house):
    ada, boss = house.account("ada", password=PASSWORD), house.browser(house.account("boss", Role.ADMIN))
    there = house.browser(ada)
    link = boss.post(f"/v1/accounts/{ada.id}/link", json={"reason": "forgot it", "reset": True}).json()["url"]
    assert there.get("/v1/me").status_code == 401
    assert code(house.stranger().post("/v1/session", json={"name": "ada", "password": PASSWORD}))[0] == 401
    again = house.stranger()
    assert again.post("/v1/session", json={"link": link.partition("#")[2]}).status_code == 200
    assert again.put("/v1/session/password", json={"password": "seven green umbrellas"}).status_code == 200


def test_more_than_so_many_requests_wait(database, tmp_path):
    house = House(database, tmp_path, requests_per_minute=3)
    with TestClient(house.app):
        ada, ben = (house.browser(house.account(name)) for name in ("ada", "ben"))
        seen = [ada.put("/v1/me/consent", json={"learn": False}).status_code for _ in range(5)]
        assert seen == [200] * 3 + [429] * 2
        assert ada.get("/v1/me").status_code == 200, "looking is not counted"
        assert ben.put("/v1/me/consent", json={"learn": False}).status_code == 200
        limited, _ = house.program(house.account("shop", Role.ADMIN), acts_for_others=True, requests_per_minute=2)
        wish = {"json": {"learn": False}, "headers": {"X-Everloop-User": "customer"}}
        seen = [limited.put("/v1/me/consent", **wish).status_code for _ in range(3)]
        assert seen == [200, 200, 429]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://testserver:81", "null"])
def test_a_page_of_another_site_cannot_act_with_somebodys_cookie(house, origin):
    ada = house.browser(house.account("ada"))
    answer = ada.put("/v1/me/consent", json={"learn": False}, headers={"Origin": origin})
    assert code(answer) == (403, "cross_site")
    own = {"Origin": "http://testserver"}
    assert ada.put("/v1/me/consent", json={"learn": False}, headers=own).status_code == 200


def test_where_access_is_open_a_name_of_somebody_elses_leads_nowhere(database, tmp_path):
    house = House(database, tmp_path, access="open")
    with TestClient(house.app):
        for host, status in (("127.0.0.1:8080", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 403)):
            assert house.stranger().get("/v1/session", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("public_url", "origin", "host", "is_own"),
    [
        ("https://chat.example", "https://chat.example", "127.0.0.1:8080", True),  # a proxy that keeps no Host
        ("https://chat.example", "https://chat.example:443", "chat.example", True),
        ("https://chat.example", "http://chat.example", "127.0.0.1:8080", False),
        ("https://chat.example", "https://chat.example.evil", "chat.example", False),
        (None, "http://[x", "testserver", False),
        (None, "http://localhost:8080", "localhost:8080", True),
    ],
)
def test_a_page_is_ours_at_the_public_address(public_url, origin, host, is_own):
    guard = Guard(None, Settings(home="/nowhere", public_url=public_url))
    headers = [(b"origin", origin.encode()), (b"host", host.encode()), (b"content-length", b"2")]
    assert (guard._refusal({"type": "http", "method": "POST", "headers": headers}) is None) == is_own


def test_under_https_a_cookie_is_of_this_host_and_secure(database, tmp_path):
    house = House(database, tmp_path, public_url="https://testserver")
    owner = house.account("owner", Role.ADMIN)
    with TestClient(house.app):
        with house.database.begin() as session:
            token = sessions.offer(session, "link", 60, session.merge(owner))
        answer = house.stranger().post("/v1/session", json={"link": token})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-everloop=") and "Secure" in cookie and "Path=/" in cookie
    assert answer.headers["strict-transport-security"]


def test_what_has_changed_here_is_known_at_once_and_elsewhere_within_two_seconds(database, tmp_path, monkeypatch):
    house = House(database, tmp_path)
    with TestClient(house.app):
        ada = house.account("ada")
        browser = house.browser(ada)
        secret = browser.post("/v1/keys", json={"name": "x"}).json()
        program = house.stranger()
        program.headers["Authorization"] = f"Bearer {secret['secret']}"
        assert program.get("/v1/me").status_code == 200
        assert browser.delete(f"/v1/keys/{secret['id']}").status_code == 204
        assert program.get("/v1/me").status_code == 401, "revoked through this process"
        program, key_id = house.program(ada)
        assert program.get("/v1/me").status_code == 200
        with house.database.begin() as session:  # as another process would
            keys.revoke(keys.get(session, key_id))
        assert program.get("/v1/me").status_code == 200
        monkeypatch.setattr(gate, "KNOWN_FOR_S", 0.0)  # as after that time
        assert program.get("/v1/me").status_code == 401


@pytest.mark.parametrize("written", ["ÉLODIE", "e\u0301lodie", "Élodie "])
def test_a_name_is_one_however_it_is_written(house, written):
    house.account("élodie", password=PASSWORD)
    assert house.stranger().post("/v1/session", json={"name": written, "password": PASSWORD}).status_code == 200
    boss = house.browser(house.account("boss", Role.ADMIN))
    assert code(boss.post("/v1/accounts", json={"name": written, "reason": "x"})) == (409, "name_taken")


def test_of_two_who_take_a_name_at_once_one_is_told(house):
    outcomes = []

    def take():
        try:
            outcomes.append(house.account("ada").name)
        except ConflictError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ada"] + ["name_taken"] * 3


def test_who_was_forgotten_says_nothing_more_under_the_name_of_before(house):
    """As a tab does that was open before, or a process that has not heard of it yet."""
    account = house.account("ada")
    with house.database.begin() as session:
        users.ensure(session, [account.user_id])
        erasure.forget(session, account.user_id, "retrain-required")
    with house.database.begin() as session:
        met = users.meet_many(session, [account.user_id, "somebody else"])
        assert met[account.user_id].code == "not_you" and met["somebody else"].key
    with house.database() as session:
        assert session.get(User, account.user_id) is None


def test_replacing_a_key_gives_one_that_lasts_as_long(house):
    browser = house.browser(house.account("ada"))
    made = browser.post("/v1/keys", json={"name": "x", "days": 90}).json()
    fresh = browser.post(f"/v1/keys/{made['id']}/rotate", json={}).json()
    ends_at = datetime.fromisoformat(fresh["expires_at"])
    assert timedelta(days=89) < ends_at - datetime.now(UTC) <= timedelta(days=90)
    assert code(browser.post(f"/v1/keys/{made['id']}/rotate", json={})) == (409, "key_over")


def test_the_account_of_our_own_commands_is_nobodys(house):
    boss = house.account("boss", Role.ADMIN)
    browser = house.browser(boss)
    with house.database.begin() as session:
        accounts.ensure(session, "operator", Role.ADMIN, is_service=True)
    assert [each["name"] for each in browser.get("/v1/accounts").json()] == ["boss"]
    change = {"role": "user", "reason": "x"}
    assert code(browser.patch("/v1/accounts/operator", json=change)) == (404, "account_not_found")
    assert code(browser.patch(f"/v1/accounts/{boss.id}", json=change)) == (409, "last_admin")


def test_a_request_is_counted_once_and_being_forgotten_gives_no_new_budget(database, tmp_path):
    house = House(database, tmp_path, requests_per_minute=3)
    with TestClient(house.app):
        rater = house.browser(house.account("ann", Role.RATER))
        body = {"items": [{"messages": [{"role": "user", "content": "Hi"}], "answer": "Hello"}]}
        seen = [rater.post("/v1/rewards/score", json=body).status_code for _ in range(5)]
        assert seen == [503] * 3 + [429] * 2  # there is no worker here
        account = house.account("ada")
        with house.database.begin() as session:
            users.ensure(session, [account.user_id])
        ada = house.browser(account)
        assert ada.delete("/v1/me").status_code == 202
        seen = [ada.put("/v1/me/consent", json={"learn": False}).status_code for _ in range(4)]
        assert seen == [200] * 2 + [429] * 2


def test_a_program_bears_its_accounts_name(house):
    ann = house.inside
    ann.cookies.update(house.browser(house.account("ann", Role.RATER)).cookies)
    verdict = {"kind": "judge", "score": 1.0, "episode_id": "ep_1", "user": "judge-1", "idempotency_key": "k"}
    with house.database.begin() as session:
        key, _ = episodes.begin(session, "ben", True)
        messages = [{"role": "user", "content": "Hi"}]
        recording = Recording(
            episodes.new_episode_id(), "ben", "base", None, None, "champion", 1.0, messages, {}, True, "Hello"
        )
        recording.status = "complete"
        assert episodes.record(session, recording, key)
    assert ann.post("/v1/feedback", json={**verdict, "episode_id": recording.episode_id}).status_code == 202
    with house.database() as session:
        assert session.scalar(sa.select(Feedback.user_id)) == "ann/judge-1"


def test_secrets_are_stored_as_digests_only(house):
    ada = house.account("ada")
    browser = house.browser(ada)
    secret = browser.post("/v1/keys", json={"name": "x"}).json()["secret"]
    cookie = next(iter(browser.cookies.values()))
    with house.database.begin() as session:
        link = sessions.offer(session, "link", 60, session.merge(ada))
    with house.database() as session:
        tables = ("accounts", "api_keys", "login_sessions", "one_time_tokens", "audit_log")
        stored = " ".join(str(session.execute(sa.text(f"SELECT * FROM {name}")).all()) for name in tables)
    assert ada.id in stored
    for shown in (secret, cookie, link):
        assert shown not in stored


def test_what_is_over_goes(house):
    ada = house.account("ada")
    with house.database.begin() as session:
        sessions.offer(session, "link", -1, session.merge(ada))
        sessions.begin(session, session.merge(ada), days=-1)
    house.browser(ada)
    with house.database() as session:
        assert len(session.scalars(sa.select(LoginSession)).all()) == 1
        assert session.scalars(sa.select(OneTimeToken)).all() == []
