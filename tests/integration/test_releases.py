"""Releases as people see them: lineage, HTTP, the command line."""

import json

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient

from agent.app import _everloop_error
from deploy import erasure, head, lineage, registry, releases_api, serving
from deploy.promotion import Operator
from deploy.runs import TrainingRun
from deploy.store import open_store
from deploy.tables import Adapter, AuditEntry, Release, Replica
from infra.access.gate import Gate
from infra.errors import ConflictError, EverloopError, IntegrityError, UnavailableError
from tests.adapters import CANARY, adapter_of, make_adapter, promote, refusal, serve


@pytest.fixture
def family(registered):
    """base ← a ← b ← c, base ← d: of two runs, two datasets and two reward snapshots."""
    a = registered(seed=0, run_id="run_1", dataset_digest="d1" * 32, reward_snapshot_id=1)
    b = registered(seed=1, started_from=a, run_id="run_2", dataset_digest="d2" * 32, reward_snapshot_id=1)
    c = registered(seed=2, started_from=b, run_id="run_3", dataset_digest="d2" * 32, reward_snapshot_id=12)
    return a, b, c, registered(seed=3)


def test_lineage_is_told_in_both_directions(database, family):
    a, b, c, d = family
    with database.begin() as session:
        session.add(TrainingRun(id="run_2", recipe="kto", status="canary", phase="gates", config={}))
    promote(database, a)
    with database.begin() as session:
        canary_id = head.open_canary(session, challenger=b, **CANARY).id
    with database() as session:
        found = lineage.lineage(session, b)
        assert (found.ancestors, found.descendants, found.alias) == ([a, "base"], [c], "challenger")
        assert (found.run, found.recipe, found.run_status) == ("run_2", "kto", "canary")
        assert (found.dataset_digest, found.reward_snapshot) == ("d2" * 32, 1)
        assert [(canary.id, canary.champion, canary.decision) for canary in found.canaries] == [
            (canary_id, a, None)
        ]
        assert lineage.lineage(session, "champion").name == a
        assert lineage.descendants(session, [a]) == [b, c] and lineage.descendants(session, [c, d]) == []
        assert lineage.lineage(session, "base").descendants == [a, b, c, d]

        def names(**wanted):
            return [view.name for view in lineage.releases(session, **wanted)]

        assert names() == [d, c, b, a, "base"] and names(limit=2) == [d, c]
        assert names(run="run_1") == [a] and names(dataset="d2" * 32) == [c, b] == names(dataset="d2d2")
        assert names(reward_snapshot=1) == [b, a] and names(reward_snapshot=12) == [c]
        assert names(dataset="%") == [] and names(run="run_%") == []


def test_an_erasure_marks_what_came_of_a_run_and_all_that_goes_on_from_it(database, family):
    a, b, c, _ = family
    promote(database, c)
    with database.begin() as session:
        session.execute(sa.update(Adapter).where(Adapter.run_id == "run_1").values(files_deleted_at=sa.func.now()))
        marked = erasure.mark(session, ["run_2"], "quarantine")
        assert marked["releases_marked"] == [b, c]
        assert marked["champion"] == "base", "the clean one behind them has no files any more"
        assert refusal(IntegrityError, registry.check_kept, session, a) == "adapter_deleted"


def test_releases_are_told_over_http(database, family, settings):
    a, b, *_ = family
    app = FastAPI()
    app.state.sessions, app.state.settings = database, settings
    app.state.gate = Gate(database, settings.model_copy(update={"access": "open"}))
    app.include_router(releases_api.router)
    app.add_exception_handler(EverloopError, _everloop_error)
    client = TestClient(app)
    found = client.get("/v1/releases", params={"dataset": "d2", "limit": 1}).json()
    assert [view["name"] for view in found] == [family[2]]
    assert client.get(f"/v1/releases/{b}").json()["ancestors"] == [a, "base"]
    assert client.get("/v1/releases/champion").json()["name"] == "base"
    missing = client.get("/v1/releases/r9-nope")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "release_not_found"


def test_an_adapter_from_outside_is_imported_shown_promoted_and_pruned(database, everloop, tmp_path):
    directory = make_adapter(tmp_path / "outside", seed=7)
    told = ("--reason", "from a friend", "--name", "kind", "--json", "-")
    status, out, err = everloop("releases", "import", str(directory), *told)
    assert status == 0, err
    assert json.loads(out)["release"] == "kind"
    with database() as session:
        entry = session.scalars(sa.select(AuditEntry).where(AuditEntry.action == "imported")).one()
        assert (entry.subject, entry.reason) == ("kind", "from a friend") and entry.actor
    with database.begin() as session:
        for served in ("kind", "base"):
            serve(session, served)
    assert everloop("promote", "kind", "--reason", "try it")[0] == 0
    assert "[already_champion]" in everloop("promote", "champion", "--reason", "again")[2]
    status, out, _ = everloop("releases", "list", "--json", "-")
    listed = json.loads(out)["releases"]
    assert [(view["name"], view["alias"]) for view in listed] == [("kind", "champion"), ("base", None)]
    assert "kind" in everloop("releases", "list")[1] and "champion" in everloop("releases", "show", "champion")[1]
    assert json.loads(everloop("releases", "show", "kind", "--json", "-")[1])["run"] is None
    assert "base" in everloop("releases", "lineage", "kind")[1]
    status, out, _ = everloop("releases", "prune", "--dry-run", "--json", "-")
    assert status == 0 and json.loads(out)["releases"] == []
    assert everloop("rollback", "--reason", "enough")[0] == 0


@pytest.mark.parametrize(
    ("config", "options", "code"),
    [
        ({"r": 64}, [], "adapter_rank_too_large"),
        ({"use_dora": True}, [], "adapter_unsupported"),
        ({}, ["--name", "champion"], "name_protected"),
        ({}, ["--name", "run/x@1"], "name_protected"),
    ],
)
def test_what_must_not_be_imported_is_refused_in_one_sentence(database, everloop, tmp_path, config, options, code):
    directory = make_adapter(tmp_path / "outside", **config)
    status, _, err = everloop("releases", "import", str(directory), "--reason", "a test", *options)
    assert status == 1 and f"[{code}]" in err and "Traceback" not in err
    with database() as session:
        assert session.scalars(sa.select(Release.name)).all() == ["base"]
        assert session.scalars(sa.select(AuditEntry.action)).all() == []


def test_promotion_and_rollback_refuse_what_cannot_be_served(database, everloop, registered, settings, tmp_path):
    name, other = registered(seed=0), registered(seed=1)
    with database.begin() as session:
        for served in (name, other, "base"):
            serve(session, served)
    assert everloop("promote", name, "--reason", "a test")[0] == 0
    assert everloop("promote", other, "--reason", "a test")[0] == 0
    with database() as session:
        weights = open_store(settings).place(adapter_of(session, name).digest) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x01")
    assert "[adapter_changed]" in everloop("rollback", "--reason", "a test")[2]
    weights.write_bytes(whole)
    base = tmp_path / "base" / "model.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"\x01")
    assert "[adapter_of_another_base]" in everloop("rollback", "--reason", "a test")[2]
    assert "[adapter_of_another_base]" in everloop("promote", name, "--reason", "a test")[2]
    with database() as session:
        assert head.read(session).champion == other, "nothing moved"
    assert everloop("promote", "base", "--reason", "begin anew")[0] == 0


@pytest.mark.parametrize(
    ("verdict", "allowed", "refused"),
    [
        ("pass", "none", False),
        (None, "none", True),
        (None, "inconclusive", False),
        ("fail", "inconclusive", True),
        ("fail", "any", False),
    ],
)
def test_who_promotes_by_hand_goes_past_gates_only_where_the_setting_allows_it(
    database, registered, settings, verdict, allowed, refused
):
    name = registered(seed=0, run_id="run_1")
    gates = {"gates": [{"gate": "win_rate", "verdict": verdict}]}
    with database.begin() as session:
        serve(session, name)
        if verdict is not None:
            session.add(
                TrainingRun(
                    id="run_1", recipe="dpo", status="held", phase="gates", config={}, release=name, result=gates
                )
            )
    operator = Operator(database, settings.model_copy(update={"gate_overrides": allowed}), "ann")
    if refused:
        assert refusal(ConflictError, operator.promote, name, "a test") == "gates_not_passed"
    else:
        assert operator.promote(name, "a test") == ("base", name)
    with database() as session:
        assert head.read(session).champion == ("base" if refused else name)
        said = session.scalars(sa.select(AuditEntry.details).where(AuditEntry.action == "gates_overridden")).all()
    overridden = [] if refused or verdict == "pass" else [["win_rate" if verdict else "never_judged"]]
    assert [entry["gates"] for entry in said] == overridden


def test_a_rollback_goes_to_former_champions_only_and_asks_no_gate(database, registered, settings):
    former, other = registered(seed=0), registered(seed=1)
    with database.begin() as session:
        for served in (former, other, "base"):
            serve(session, served)
    promote(database, former)
    promote(database, "base")
    operator = Operator(database, settings.model_copy(update={"gate_overrides": "none"}), "ann")
    assert refusal(ConflictError, operator.roll_back, other, "a test") == "never_champion"
    with database() as session:
        assert head.read(session).champion == "base"
    assert operator.roll_back(former, "a test") == ("base", former)


def test_nobody_is_promoted_who_was_proved_by_an_engine_not_seen_since(database, registered, settings, monkeypatch):
    monkeypatch.setattr(serving, "READY_TIMEOUT_S", 0.2)
    name = registered(seed=0)
    with database.begin() as session:
        serve(session, name)
        serve(session, "base")
        session.execute(sa.update(Replica).values(seen_at=sa.func.now()))
    operator = Operator(database, settings, "ann")
    assert refusal(UnavailableError, operator.promote, name, "a test") == "release_not_ready"
    promote(database, name)
    assert operator.roll_back("base", "a test") == (name, "base"), "who goes back does not wait"
