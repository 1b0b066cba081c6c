"""What an operator does over HTTP and from the command line, and what is written down of it."""

import json

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient

import deploy.api
from agent.app import _everloop_error, build_app
from deploy import audit, autonomy, canary, head, journal, serving
from deploy.followers import Followers
from deploy.rollout import Event
from deploy.tables import AuditEntry, Replica
from feedback import users
from feedback.tables import User
from infra.access.gate import Gate
from infra.errors import EverloopError
from infra.events import DeploymentChanged
from infra.tables import OutboxRow
from reward.tables import RewardRater
from tests.adapters import CANARY, serve

ARMS = ("champion", "challenger")


@pytest.fixture
def names(database, registered):
    """Two releases that the one replica serves, as the base model."""
    made = [registered(seed=0), registered(seed=1)]
    with database.begin() as session:
        for name in (*made, "base"):
            serve(session, name)
    return made


@pytest.fixture
def client(database, settings):
    app = FastAPI()
    app.state.sessions, app.state.settings = database, settings
    app.state.canary_followers = Followers()
    app.state.gate = Gate(database, settings.model_copy(update={"access": "open"}))
    app.include_router(deploy.api.router)
    app.add_exception_handler(EverloopError, _everloop_error)
    return TestClient(app)


def code(response):
    return response.status_code, response.json()["error"]["code"]


def announced(database):
    """What the log is told of the deployment: action and champion of each event."""
    wanted = OutboxRow.topic == DeploymentChanged.topic
    with database() as session:
        values = session.scalars(sa.select(OutboxRow.value).where(wanted).order_by(OutboxRow.seq))
        events = [json.loads(value)["data"] for value in values]
    return [(event["action"], event["champion"]) for event in events]


def test_promotion_and_rollback_over_http_are_acts_with_an_address_and_events(client, database, names):
    one, two = names
    post = lambda act, **body: client.post(f"/v1/deployment/{act}", json={"reason": "a test", **body})  # noqa: E731
    assert client.get("/v1/deployment").json()["rolls_back_to"] is None
    assert code(post("rollback")) == (409, "nothing_to_roll_back")
    assert post("promote", release=one).json() == {"before": "base", "champion": one}
    assert post("promote", release=two).json() == {"before": one, "champion": two}
    assert client.post("/v1/deployment/promote", json={"release": one, "reason": ""}).status_code == 422
    assert client.get("/v1/deployment").json()["rolls_back_to"] == one
    assert post("rollback").json() == {"before": two, "champion": one}
    # Twice in a row goes further back, and never to what one has just gone back from.
    assert client.get("/v1/deployment").json()["rolls_back_to"] == "base"
    assert post("rollback").json() == {"before": one, "champion": "base"}
    assert code(post("rollback")) == (409, "nothing_to_roll_back")
    assert post("rollback", to=two).json() == {"before": "base", "champion": two}
    acts = ["promoted_by_hand"] * 2 + ["rolled_back_by_hand"] * 3
    champions = [one, two, one, "base", two]
    assert announced(database) == list(zip(acts, champions, strict=True))
    entries = client.get("/v1/audit", params={"automatic": False}).json()[::-1]
    moves = [entry for entry in entries if entry["action"] in acts]
    assert [entry["subject"] for entry in moves] == [one, two, two, one, "base"], "what each was about"
    assert [entry["action"] for entry in moves] == acts and {entry["address"] for entry in moves} == {"testclient"}


def test_a_replica_that_is_ill_keeps_nobody_from_going_back(client, database, names, monkeypatch):
    monkeypatch.setattr(serving, "READY_TIMEOUT_S", 0.3)
    one, _ = names
    client.post("/v1/deployment/promote", json={"release": one, "reason": "a test"}).raise_for_status()
    with database.begin() as session:
        session.add(
            Replica(url="http://ill", is_up=True, spoiled={}, seen_at=sa.func.now() + sa.text("'1 hour'::interval"))
        )
    refused = client.post("/v1/deployment/promote", json={"release": "base", "reason": "a test"})
    assert code(refused) == (503, "release_not_ready") and "http://ill" in refused.json()["error"]["message"]
    gone_back = client.post("/v1/deployment/rollback", json={"reason": "a test"})
    assert gone_back.json() == {"before": one, "champion": "base"}


def test_a_canary_is_opened_held_and_aborted_over_http(client, database, settings, names):
    one, two = names
    opened = client.post("/v1/canaries", json={"release": one, "reason": "a test", "share": 0.5})
    assert opened.status_code == 201 and opened.json()["challenger"] == one
    path = f"/v1/canaries/{opened.json()['id']}"
    assert code(client.post("/v1/canaries", json={"release": two, "reason": "a test"})) == (409, "canary_open")
    deployment = client.get("/v1/deployment").json()
    assert (deployment["challenger"], deployment["share"]) == (one, 0.5) and deployment["sentence"]
    for act in ("hold", "resume"):
        assert client.post(f"{path}/{act}", json={"reason": "a test"}).status_code == 200
    assert [row["event"] for row in client.get(path).json()["rows"]] == ["hold", "resume"]
    assert client.post(f"{path}/abort", json={"reason": "enough"}).json()["decision"] == "aborted"
    assert code(client.post(f"{path}/hold", json={"reason": "late"})) == (409, "canary_closed")
    assert code(client.get("/v1/canaries/999")) == (404, "canary_not_found")
    champion = client.post("/v1/canaries", json={"release": "base", "reason": "against itself"})
    assert code(champion) == (409, "already_champion")
    with database.begin() as session:
        autonomy.propose(session, settings, "canary", two, actor="everloop/test", reason="it passed")
    [waiting] = client.get("/v1/proposals").json()
    assert client.post(f"/v1/proposals/{waiting['id']}/decline", json={"reason": "no"}).status_code == 204
    assert client.get("/v1/proposals").json() == []
    set_to = client.put("/v1/deployment/autonomy", json={"level": "observe", "reason": "a holiday"})
    assert set_to.json()["autonomy"] == "observe"
    [by_itself] = client.get("/v1/audit", params={"automatic": True}).json()
    assert (by_itself["actor"], by_itself["reason"]) == ("everloop/test", "it passed")


def test_the_command_line_takes_a_canary_through_and_explains_it(database, everloop, names):
    one, two = names
    status, out, err = everloop("canary", "open", one, "--reason", "a test", "--share", "0.5", "--json", "-")
    assert status == 0, err
    number = str(json.loads(out)["id"])
    assert "[canary_open]" in everloop("canary", "open", two, "--reason", "a test")[2]
    for act in ("hold", "resume"):
        assert everloop("canary", act, number, "--reason", "a test")[0] == 0
    status, out, err = everloop("canary", "explain", number)
    assert status == 0, err
    assert "hold" in out and "resume" in out and "limit" in out and f"canary {number}: open" in out
    assert everloop("canary", "abort", number, "--reason", "enough")[0] == 0
    status, out, _ = everloop("canary", "list")
    assert status == 0 and one in out and "aborted" in out and "enough" in out
    assert "[canary_not_found]" in everloop("canary", "explain", "999")[2]
    status, out, _ = everloop("autonomy", "propose", "--reason", "a test")
    assert status == 0 and "propose" in everloop("autonomy")[1]
    with database() as session:
        assert head.read(session).autonomy == "propose"


def test_the_command_line_goes_back_by_name_and_verifies_the_audit_log(database, everloop, names):
    for name in names:
        assert everloop("promote", name, "--reason", "a test")[0] == 0
    assert everloop("rollback", "--to", "base", "--reason", "a test")[0] == 0
    status, out, _ = everloop("audit", "list", "--by-hand")
    assert status == 0 and out.count("promoted_by_hand") == 2 and "rolled_back_by_hand" in out
    status, out, _ = everloop("audit", "verify", "--json", "-")
    last = json.loads(out)["last_hash"]
    assert status == 0 and everloop("audit", "verify", "--expect", last)[0] == 0
    status, _, err = everloop("audit", "verify", "--expect", "0" * 64)
    assert status == 1 and "[audit_cut]" in err
    with database.begin() as session:
        session.execute(sa.text("ALTER TABLE audit_log DISABLE TRIGGER ALL"))
        session.execute(sa.update(AuditEntry).where(AuditEntry.id == 1).values(reason="another"))
    status, _, err = everloop("audit", "verify")
    assert status == 1 and "[audit_changed]" in err and "Traceback" not in err


def test_what_is_kept_of_a_canary_is_what_its_log_says_and_stays_small(database, names):
    events = [Event(n, "vote", arm, good=(n + (arm == "champion")) % 3 > 0) for n in range(1500) for arm in ARMS]
    with database.begin() as session:
        opened = head.open_canary(session, challenger=names[0], **CANARY)
        followers = Followers()
        for start in range(0, len(events), 400):
            journal.append(session, opened.id, events[start : start + 400])
            follower = followers.catch_up(session, opened)
        assert follower.rollout.evidence() == canary.recompute(session, opened).evidence()
        assert follower.num_events == len(events) and len(follower.points) >= canary.MAX_POINTS / 2
        assert len(follower.points) <= canary.MAX_POINTS
        assert [point.at_s for point in follower.points] == sorted(point.at_s for point in follower.points)
        assert followers.catch_up(session, opened) is follower, "it was computed again"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/operate/rollout/77", 404, "There is no canary 77"),
        ("/operate/releases/nothing", 404, "There is no release"),
        ("/operate/runs/run_none", 404, "There is no run"),
        ("/operate/feedback/ep_none", 404, "There is no episode"),
        ("/operate/learning?csv=nothing", 404, "There is no chart"),
        ("/operate/audit?before_id=x", 400, "before_id"),
        ("/operate/feedback?user=a%00b", 400, "user"),
        ("/operate/nothing", 404, "Not Found"),
    ],
)
def test_what_a_page_cannot_show_is_a_page_that_says_why(database, settings, path, status, said):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    open_to_all = {"database_url": url, "engine_url": "http://127.0.0.1:9", "access": "open"}
    with TestClient(build_app(settings.model_copy(update=open_to_all)), base_url="http://localhost") as client:
        answer = client.get(path)
    assert answer.status_code == status and said in answer.text
    assert answer.headers["content-type"].startswith("text/html")


def test_what_is_decided_at_a_terminal_is_audited_as_on_a_page(database, everloop):
    with database.begin() as session:
        users.ensure(session, ["ada"])
        key = session.get_one(User, "ada").key_id
        session.add(RewardRater(name=key, num_votes=1, num_right=0, num_wrong=0, set_aside=False, first_at_s=0.0))
    for ruling in ("ban", "clear", "reinstate"):
        status, _, told = everloop("reward", ruling, "ada", "--reason", "she asked for it")
        assert status == 0, told
    with database() as session:
        entries = audit.newest(session, 3)
        assert [entry.action for entry in entries] == ["rater_reinstated", "rater_cleared", "rater_banned"]
        assert {(entry.subject, entry.reason) for entry in entries} == {(key, "she asked for it")}


def test_accounts_are_made_and_kept_out_at_a_terminal(database, everloop):
    status, link, told = everloop("access", "add", "ann", "--role", "rater", "--reason", "rates on Mondays")
    assert status == 0 and link.startswith("http://127.0.0.1:8080/login#"), told
    status, secret, told = everloop("access", "key", "ann", "--role", "rater", "--reason", "her script")
    assert status == 0 and secret.startswith("everloop_"), told
    assert (
        everloop("access", "key", "ann", "--acts-for-others", "--reason", "x")[2].strip().endswith("[role_needed]")
    )
    _, shown, _ = everloop("access", "keys", "ann", "--json", "-")
    (key,) = json.loads(shown)["keys"]
    assert everloop("access", "role", "ann", "operator", "--reason", "grown")[0] == 0
    assert everloop("access", "revoke", key["id"], "--reason", "leaked")[0] == 0
    assert everloop("access", "disable", "ann", "--reason", "left")[0] == 0
    _, shown, _ = everloop("access", "list", "--json", "-")
    (account,) = json.loads(shown)["accounts"]
    assert (account["name"], account["role"], account["disabled"], account["keys"]) == ("ann", "operator", True, 0)
    assert account["user"].startswith("u_")
    assert everloop("access", "link", "nobody")[2].strip().endswith("[account_not_found]")
    status, link, told = everloop(
        "access", "link"
    )  # as where migrations have made the tables, and no `up` the owner
    assert status == 0 and "/login#" in link, told
    _, shown, _ = everloop("access", "list", "--json", "-")
    assert {(row["name"], row["role"]) for row in json.loads(shown)["accounts"]} == {
        ("ann", "operator"), ("owner", "admin")
    }  # fmt: skip


def test_consent_of_somebody_who_has_said_nothing_is_noted_with_a_warning(database, everloop):
    status, _, told = everloop("users", "consent", "owner", "--no-learn")
    assert status == 0 and "nobody of that name" in told and "access list" in told
    assert "nobody of that name" not in everloop("users", "consent", "owner", "--learn")[2]
