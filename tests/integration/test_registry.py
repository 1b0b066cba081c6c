"""The registry on a real PostgreSQL, without the rest of the stack: what is taken, named, promoted and kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from deploy import head, registry, retention
from deploy.runs import TrainingRun
from deploy.store import open_store
from deploy.tables import Adapter, AuditEntry, Release
from infra.errors import ConflictError, EverloopError, IntegrityError, NotFoundError, SetupError
from infra.settings import Settings
from tests.adapters import make_adapter, make_base


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path / "home", base_model=str(make_base(tmp_path / "base")))


@pytest.fixture
def registered(database, settings, tmp_path):
    """A function that registers an adapter and returns its release's name."""

    def register(seed=0, started_from="base", run_id=None, name=None, **manifest):
        source = make_adapter(tmp_path / f"source-{seed}", seed=seed)
        manifest = {"started_from": started_from, **manifest}
        with database.begin() as session:
            return registry.register(session, settings, source, run_id=run_id, manifest=manifest, name=name).name

    return register


def promote(database, name):
    with database.begin() as session:
        head.move_champion(session, name, action="promoted_by_hand", actor="test", reason="a test")


def refusal(kind, call, *args, **options):
    with pytest.raises(kind) as refused:
        call(*args, **options)
    return refused.value.code


def adapter_of(session, name):
    return session.get_one(Adapter, registry.get_release(session, name).adapter_digest)


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
        head.open_canary(session, challenger=second, share=0.5, alpha=0.05, gates=[], actor="test", reason="a test")
    with database() as session:
        assert registry.get_release(session, "champion").name == first
        assert registry.get_release(session, "challenger").name == second
        assert head.pinned(session, "challenger").release == second
    promote(database, "challenger")
    with database() as session:
        assert head.read(session).champion == second and head.read(session).challenger is None
    assert refusal(ConflictError, promote, database, "champion") == "already_champion"


@pytest.fixture
def aged(database, settings):
    """A function that makes all adapters old, and a round of retention that keeps one promotion for a rollback."""
    kept = settings.model_copy(update={"releases_kept": 1})

    def prune(**options):
        with database.begin() as session:
            session.execute(sa.update(Adapter).values(stored_at=sa.func.now() - sa.text("interval '90 days'")))
        return retention.prune(database, kept, **options)

    return prune


def has_files(database, settings, name):
    with database() as session:
        return adapter_of(session, name).digest in open_store(settings).digests()


CANARY = {"share": 0.5, "alpha": 0.05, "gates": [], "actor": "test", "reason": "a test"}


def test_files_that_nothing_needs_go_and_their_history_stays(database, settings, registered, aged):
    first, held, second = registered(seed=0), registered(seed=1), registered(seed=2)
    promote(database, first)
    promote(database, second)
    assert retention.prune(database, settings).releases == [], "they are young"
    told = aged(dry_run=True)
    assert told.releases == [held] and told.num_deleted == 0 and has_files(database, settings, held)
    done = aged()
    assert done.releases == [held] and done.num_deleted == 1 and done.orphans == []
    assert [has_files(database, settings, name) for name in (first, held, second)] == [True, False, True]
    assert aged().releases == [], "once"
    with database() as session:
        assert adapter_of(session, held).files_deleted_at is not None
        acts = sa.select(AuditEntry.subject).where(AuditEntry.action == "files_deleted")
        assert session.scalars(acts).all() == [held]
        assert refusal(IntegrityError, registry.verified_path, session, settings, held) == "adapter_deleted"
    assert refusal(IntegrityError, promote, database, held) == "adapter_deleted"
    with database.begin() as session:
        assert refusal(IntegrityError, head.open_canary, session, challenger=held, **CANARY) == "adapter_deleted"
    assert registered(seed=1) == held, "registering the files again puts them back"
    assert retention.prune(database, settings.model_copy(update={"releases_kept": 1})).releases == [], "young again"
    promote(database, held)


def test_what_an_open_canary_or_a_running_run_uses_stays(database, settings, registered, aged):
    challenger, judged, was_champion = registered(seed=0), registered(seed=1), registered(seed=2)
    parent = registered(seed=3)
    child = registered(seed=4, started_from=parent)
    promote(database, was_champion)
    with database.begin() as session:
        running = {"recipe": "kto", "status": "running", "phase": "train", "config": {}, "release": judged}
        session.add(TrainingRun(id="run_1", **running))
    promote(database, "base")
    promote(database, child)
    with database.begin() as session:
        canary_id = head.open_canary(session, challenger=challenger, **CANARY).id
    assert aged().releases == []
    with database.begin() as session:
        head.close_canary(session, canary_id, decision="rollback", evidence={}, actor="test", reason="worse")
        session.get_one(TrainingRun, "run_1").status = "held"
    assert aged().releases == [challenger, judged, was_champion], "the champion's parent is needed still"


def test_a_crash_between_the_decision_and_the_deletion_is_made_good_by_the_next_round(
    database, settings, registered, aged, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    name = registered()
    with monkeypatch.context() as patch:
        patch.setattr("deploy.store.DirectoryStore.delete", die)
        with pytest.raises(KeyboardInterrupt):
            aged()
    assert has_files(database, settings, name)
    with database() as session:
        assert refusal(IntegrityError, registry.check_servable, session, settings, name) == "adapter_deleted"
    done = aged()
    assert done.releases == [] and done.num_deleted == 1 and not has_files(database, settings, name)


def test_an_adapter_that_no_row_names_is_told_and_left_alone(database, settings, registered, tmp_path):
    registered()
    with database() as session:
        source = make_adapter(tmp_path / "orphan", seed=9)
        digest = registry.register(session, settings, source, run_id=None, manifest={}).adapter_digest
        session.rollback()
    assert retention.prune(database, settings).orphans == [digest] and digest in open_store(settings).digests()


def test_no_promotion_comes_between_the_decision_and_its_being_written(database, registered):
    """Whoever promotes waits for the head, and then finds the files deleted."""
    name = registered()
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            registry.lock_head(session)
            promoting = pool.submit(promote, database, name)
            with pytest.raises(TimeoutError):
                promoting.result(timeout=0.5)
            session.execute(sa.update(Adapter).values(files_deleted_at=sa.func.now()))
        assert refusal(IntegrityError, promoting.result, timeout=10) == "adapter_deleted"


def test_retention_decides_under_the_heads_lock(database, settings, registered, aged):
    registered()
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            registry.lock_head(session)
            pruning = pool.submit(aged)
            with pytest.raises(TimeoutError):
                pruning.result(timeout=0.5)
        assert len(pruning.result(timeout=10).releases) == 1
