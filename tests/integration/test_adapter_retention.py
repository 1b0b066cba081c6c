"""Files of adapters go when nothing needs them; a promotion, a crash and a mistake are no way around it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from deploy import head, registry, retention
from deploy.runs import TrainingRun
from deploy.store import open_store
from deploy.tables import Adapter, AuditEntry, Canary
from infra.errors import IntegrityError
from tests.adapters import CANARY, adapter_of, make_adapter, promote, refusal


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
    parent, other = registered(seed=3), registered(seed=5)
    child = registered(seed=4, started_from=parent)
    promote(database, was_champion)
    with database.begin() as session:
        running = {"recipe": "kto", "status": "running", "phase": "train", "config": {}, "release": judged}
        session.add(TrainingRun(id="run_1", **running))
    promote(database, "base")
    promote(database, child)
    with database.begin() as session:
        canary_id = head.open_canary(session, challenger=challenger, **CANARY).id
        unwatched = Canary(champion="base", challenger=other, plan={}, gates=[])
        session.add(unwatched)  # one that the head does not name, and nobody has closed
    assert aged().releases == []
    with database.begin() as session:
        head.close_canary(session, canary_id, decision="rollback", evidence={}, actor="test", reason="worse")
        session.get_one(TrainingRun, "run_1").status = "held"
        session.get_one(Canary, unwatched.id).closed_at = sa.func.now()
    assert aged().releases == [challenger, judged, was_champion, other], "the champion's parent is needed still"


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


def open_canary(database, name):
    with database.begin() as session:
        head.open_canary(session, challenger=name, **CANARY)


@pytest.mark.parametrize("move", [promote, open_canary])
def test_nobody_is_promoted_or_tried_between_the_decision_and_its_being_written(database, registered, move):
    """Whoever moves the head waits for it, and then finds the files deleted."""
    name = registered()
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            registry.lock_head(session)
            moving = pool.submit(move, database, name)
            with pytest.raises(TimeoutError):
                moving.result(timeout=0.5)
            session.execute(sa.update(Adapter).values(files_deleted_at=sa.func.now()))
        assert refusal(IntegrityError, moving.result, timeout=10) == "adapter_deleted"


def test_retention_decides_under_the_heads_lock(database, settings, registered, aged):
    registered()
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as session:
            registry.lock_head(session)
            pruning = pool.submit(aged)
            with pytest.raises(TimeoutError):
                pruning.result(timeout=0.5)
        assert len(pruning.result(timeout=10).releases) == 1
