"""What is registered, on a real PostgreSQL: its files, its base model, its name."""

import pytest
import sqlalchemy as sa

from deploy import head, registry
from deploy.canary import Watch
from deploy.store import open_store
from deploy.tables import Adapter, Canary, Release
from infra.errors import ConflictError, EverloopError, IntegrityError, NotFoundError, SetupError
from tests.adapters import CANARY, adapter_of, make_adapter, make_base, promote, refusal


def test_an_adapter_is_registered_once_under_its_digest(database, settings, registered):
    name = registered()
    assert registered() == name
    with database() as session:
        adapter = adapter_of(session, name)
        path = registry.verified_path(session, settings, name)
        assert session.scalar(sa.select(sa.func.count()).select_from(Adapter)) == 1
    assert name.endswith(adapter.digest[:8]) and path == open_store(settings).place(adapter.digest)
    assert adapter.manifest["base_digest"] == adapter.base_digest == registry.present_base(settings)


@pytest.mark.parametrize(
    ("weights", "config", "code"),
    [
        (None, {"r": 17}, "adapter_rank_too_large"),
        ({}, {}, "adapter_incomplete"),
        (None, {"use_dora": True}, "adapter_unsupported"),
    ],
)
def test_what_cannot_be_served_leaves_nothing_behind(database, settings, tmp_path, weights, config, code):
    source = make_adapter(tmp_path / "source", weights=weights, **config)
    with database.begin() as session:
        assert (
            refusal(IntegrityError, registry.register, session, settings, source, run_id=None, manifest={}) == code
        )
    with database() as session:
        assert session.scalars(sa.select(Release.name)).all() == ["base"]
    assert open_store(settings).digests() == set() and not any(settings.adapters_dir.iterdir())


def test_after_a_change_of_the_base_model_no_adapter_of_the_old_one_is_used(
    database, settings, registered, tmp_path
):
    old = registered()
    promote(database, old)
    promote(database, "base")
    other = settings.model_copy(update={"base_model": str(make_base(tmp_path / "other"))})
    assert registry.present_base(other) == registry.present_base(settings), "the same weights elsewhere"
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with database() as session:
        for use in (registry.check_servable, registry.verified_path):
            assert refusal(IntegrityError, use, session, other, old) == "adapter_of_another_base"
        source = tmp_path / "source-0"
        again = {"run_id": None, "manifest": {}}
        assert (
            refusal(IntegrityError, registry.register, session, other, source, **again) == "adapter_of_another_base"
        )
        registry.verified_path(session, settings, old)
        weights.unlink()
        assert refusal(SetupError, registry.verified_path, session, other, old) == "model_weights_missing"


def test_a_canary_whose_base_model_was_changed_ends(database, settings, registered, tmp_path):
    champion, challenger = registered(seed=0), registered(seed=1)
    promote(database, champion)
    with database.begin() as session:
        canary_id = head.open_canary(session, challenger=challenger, **CANARY).id
    watch = Watch(database, settings)
    assert watch.look() is None
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "another base model" in watch.look()
    with database() as session:
        assert session.get_one(Canary, canary_id).decision == "unservable"
        assert (head.read(session).champion, head.read(session).challenger) == (champion, None)


def test_a_row_that_names_another_place_is_refused_by_the_database(database, registered):
    registered()
    with database() as session, pytest.raises(sa.exc.IntegrityError, match="ck_adapters_digest"):
        session.add(Adapter(digest="../../elsewhere", base_digest="", manifest={}))
        session.flush()


def test_files_that_changed_are_not_loaded_and_registering_them_again_mends_it(database, settings, registered):
    name = registered()
    with database() as session:
        weights = registry.verified_path(session, settings, name) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        assert refusal(IntegrityError, registry.verified_path, session, settings, name) == "adapter_changed"
    assert registered() == name
    with database() as session:
        registry.verified_path(session, settings, name)


def test_a_failure_after_the_copy_leaves_no_release(database, settings, tmp_path):
    with database() as session:
        registry.register(session, settings, make_adapter(tmp_path / "source"), run_id=None, manifest={})
        session.rollback()  # as the process would, where it dies here
        assert session.scalars(sa.select(Release.name)).all() == ["base"]
        again = registry.register(session, settings, tmp_path / "source", run_id=None, manifest={})
        registry.verified_path(session, settings, again.name)


def test_names_are_chosen_once_and_stay_with_their_adapter(database, settings, registered):
    assert registered(seed=0, name="terse") == "terse"
    assert registered(seed=0) == "terse"
    assert refusal(ConflictError, registered, seed=1, name="terse") == "name_taken"
    assert refusal(ConflictError, registered, seed=0, name="other") == "adapter_known"
    assert refusal(EverloopError, registered, seed=1, name="champion") == "name_protected"
    with database() as session:
        assert set(session.scalars(sa.select(Release.name))) == {"base", "terse"}
    assert len(open_store(settings).digests()) == 1


def test_aliases_are_what_the_head_names_now(database, registered):
    first, second = registered(seed=0), registered(seed=1)
    with database() as session:
        assert registry.get_release(session, "champion").name == "base"
        assert refusal(NotFoundError, registry.get_release, session, "challenger") == "release_not_found"
    promote(database, first)
    with database.begin() as session:
        head.open_canary(session, challenger=second, **CANARY)
    with database() as session:
        assert registry.get_release(session, "champion").name == first
        assert registry.get_release(session, "challenger").name == second
        assert head.pinned(session, "challenger").release == second
    promote(database, "challenger")
    with database() as session:
        assert head.read(session).champion == second and head.read(session).challenger is None
    assert refusal(ConflictError, promote, database, "champion") == "already_champion"
