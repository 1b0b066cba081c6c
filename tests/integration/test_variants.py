"""A release that only answers otherwise than another: made, met in a canary, promoted, gone back from."""

import pytest
import sqlalchemy as sa

from deploy import canary, head, promotion, registry, retention, serving, variants
from deploy.tables import Adapter, Attestation, Proposal, Release, Replica
from infra.errors import ConflictError, InvalidRequestError
from infra.settings import Settings
from tests.scripted_engine import ScriptedEngine, api_on

URL = "http://engine"


def propose(database, of="champion", best_of=4, **more):
    with database.begin() as session:
        return variants.propose(session, of, best_of, actor="ann", reason="try it", **more).name


@pytest.fixture
def proved(database):
    """A replica that has proved the base model."""
    with database.begin() as session:
        session.add(Replica(url=URL, is_up=True))
        session.merge(Attestation(release="base", replica=URL, served_as="base", probe=[]))


def test_it_has_the_weights_of_another_and_is_proposed(database, proved):
    assert propose(database) == "base-best4"
    with database() as session:
        release = registry.get_release(session, "base-best4")
        assert (release.variant_of, release.adapter_digest, release.decoding) == ("base", None, {"best_of": 4})
        assert session.scalars(sa.select(Proposal.release)).all() == ["base-best4"]
        assert serving.routes(session)["base-best4"] == {URL: "base"}
        assert serving.is_ready(session, "base-best4") and serving.served_as(session, "base-best4", URL) == "base"
        assert head.pinned(session, "base-best4").best_of == 4 and head.pinned(session, "base").best_of is None


def test_of_a_variant_it_has_the_weights_and_there_is_one_of_each(database):
    propose(database)
    assert propose(database, of="base-best4", best_of=2) == "base-best2"
    with database() as session:
        assert registry.get_release(session, "base-best2").variant_of == "base"
    with pytest.raises(ConflictError, match="answers so already"):
        propose(database, best_of=2, name="again")
    for number in (1, 9):
        with pytest.raises(InvalidRequestError, match="choose among 2 to 8"):
            propose(database, best_of=number)


def test_it_goes_through_canary_promotion_and_rollback_as_any_other(database, proved, tmp_path):
    settings = Settings(home=tmp_path, gate_overrides="any")
    propose(database)
    who = promotion.Operator(database, settings, "ann")
    with database.begin() as session:
        plan = canary.plan(session, settings, [], 0.5)
        opened = head.open_canary(session, challenger="base-best4", plan=plan, gates=[], actor="ann", reason="r")
        assert serving.wanted(session) == ["base"]
        arms = head.assignments(session, [f"user-{number}" for number in range(40)]).values()
        assert {(arm.release, arm.best_of) for arm in arms} == {("base", None), ("base-best4", 4)}
        head.close_canary(session, opened.id, decision="promote", evidence={}, actor="ann", reason="better")
    with database() as session:
        (served,) = {a.best_of for a in head.assignments(session, ["ada"]).values()}
        assert served == 4 and head.read(session).champion == "base-best4"
    assert who.settings is settings
    with database.begin() as session:
        assert head.previous_champion(session) == "base"
        head.move_champion(session, "base", action="rolled_back_by_hand", actor="ann", reason="costs too much")
    with database() as session:
        assert head.assignments(session, ["ada"])["ada"].best_of is None


def test_the_files_of_whose_weights_a_champion_has_stay(database, registered, settings):
    """And registering these weights again finds the release that they are, not the variant."""
    name = registered(seed=1)
    propose(database, of=name)
    with database.begin() as session:
        head.move_champion(session, f"{name}-best4", action="promoted_by_hand", actor="ann", reason="r")
        session.execute(sa.update(Adapter).values(stored_at=sa.func.now() - sa.text("interval '900 days'")))
        assert serving.wanted(session)[0] == name
    keeps_none = settings.model_copy(update={"releases_kept": 1})
    assert retention.prune(database, keeps_none, dry_run=True).releases == []
    assert registered(seed=1) == name
    with database() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Release)) == 3


def test_the_pages_say_what_it_is(database, proved, tmp_path):
    propose(database)
    with api_on(ScriptedEngine(), database, tmp_path) as http:
        assert "the best of 4 of" in http.get("/operate/releases").text
        assert "with the best of 4 of" in http.get("/operate/releases/base-best4").text
        (view,) = [each for each in http.get("/v1/releases").json() if each["name"] == "base-best4"]
    assert view["variant_of"] == "base" and view["decoding"] == {"best_of": 4}
