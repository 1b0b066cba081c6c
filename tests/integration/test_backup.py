"""A backup taken while people rate, and what a restore makes of it: whole, damaged, of another version, killed."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from deploy import audit, registry
from deploy.store import open_store
from feedback.tables import Episode, User
from flows.backup import restoring
from flows.backup.manifest import MANIFEST, sha256
from flows.bench.adapters import linear_shapes, write_adapter
from flows.bench.faults import _until_drained
from flows.bench.raters import Raters, write_pairs
from flows.bench.stack import ADDRESSES, own_stack
from infra import settings as settings_module
from infra.db import connect
from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.database import database_alone
from reward import verification
from reward.tables import RewardUpdate
from tests.conftest import EVERLOOP, wait_until

PARTS = {"postgres", "broker", "api", "relay", "ledger", "reward"}
SECRET = "correct-horse"


@pytest.fixture(scope="module")
def running(home):
    """A stack that has learned something and keeps being rated, with an adapter; its settings and sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLOOP_HOME", str(home))
        for name in ADDRESSES:
            patch.delenv(f"EVERLOOP_{name}", raising=False)
        with own_stack(PARTS) as (settings, sessions, _):
            plain = "min_new_signals = 7\nmax_answer_tokens = 200\n"
            secret = f'adapters_options = {{secret = "{SECRET}"}}  # {SECRET}\n'
            (settings.home / "everloop.toml").write_text(plain + secret)
            adapter = settings.home / "from-elsewhere"
            write_adapter(adapter, linear_shapes(settings.base_model_dir), 4, seed=1)
            with sessions.begin() as session:
                registry.register(session, settings, adapter, run_id=None, manifest={})
                audit.write(session, actor="test", action="tested", subject="base", reason="a test")
            dataset = settings.datasets_dir / ("d" * 64)
            dataset.mkdir(parents=True)
            (dataset / "dataset.jsonl").write_text("{}\n")
            yield settings, sessions


@pytest.fixture(scope="module")
def taken(running, tmp_path_factory):
    """A backup that was taken under load; its path, its report, and the home that is restored into."""
    settings, sessions = running
    target = tmp_path_factory.mktemp("backups") / "monday"
    raters = Raters(settings, write_pairs(sessions), seed=3)
    with raters:
        wait_until(lambda: len(raters.accepted) > 60 and num_learned(sessions) > 30, timeout_s=180)
        _, told = everloop("backup", target)
        after = len(raters.accepted)
        wait_until(lambda: len(raters.accepted) > after + 20, timeout_s=60)
    assert set(raters.answers) == {"202"}, "people noticed the backup"
    _until_drained(sessions)
    return target, told


def num_learned(sessions):
    with sessions() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(RewardUpdate))


def everloop(*command, home=None, fails=False):
    """Run ``everloop``; return what it said, and its report."""
    given = {**os.environ, **({"EVERLOOP_HOME": str(home)} if home else {})}
    done = subprocess.run(
        [*EVERLOOP, *map(str, command), "--json", "-"], capture_output=True, text=True, env=given, timeout=200
    )
    assert (done.returncode != 0) == fails and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr, None if fails else json.loads(done.stdout)


@contextmanager
def opened(home):
    """Open a restored home's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLOOP_HOME", str(home))
        with database_alone(settings_module.load(recorded_addresses=False)) as settings:
            sessions = connect(settings.need("database_url"), pool_size=1)
            with sessions() as session:
                yield settings, session
            sessions.kw["bind"].dispose()


def test_a_backup_under_load_is_whole_and_restored_is_what_it_was(running, taken, tmp_path):
    settings, _ = running
    target, told = taken
    said = json.loads((target / MANIFEST).read_text())
    assert sha256(target / MANIFEST) == told["sha256"] and said["counts"]["signals"] >= 60
    assert [path for path in target.rglob("*") if path.is_file() and path.stat().st_mode & 0o077] == []
    assert target.stat().st_mode & 0o777 == 0o700
    home = tmp_path / "restored"
    _, report = everloop("restore", target, "--expect", told["sha256"], home=home)
    assert report["counts"] == said["counts"] and report["adapters"] == 1 and report["audit_entries"] >= 1
    [learned] = report["reward"].values()
    assert learned["num_signals"] > 0 and learned["replayed"] >= learned["num_signals"]
    assert learned["same_bits"] and learned["difference"] < 1e-6
    assert not {"restoring", "run"} & {path.name for path in home.iterdir()}
    with opened(home) as (restored, session):
        assert session.scalar(sa.select(sa.func.count()).select_from(Episode)) == said["counts"]["episodes"]
        assert audit.verify(session).last_hash == said["audit"]["last_hash"]
        assert verification.posteriors(session) == said["reward"]
        [digest] = open_store(Settings(home=home)).digests()
        assert open_store(settings).fetch(digest).name == open_store(Settings(home=home)).fetch(digest).name
    assert (restored.min_new_signals, restored.max_answer_tokens) == (7, 200)
    assert report["settings_to_set_again"] == ["adapters_options"]
    for path in target.rglob("*.toml"):
        assert SECRET not in path.read_text()
    assert "[home_not_empty]" in everloop("restore", target, home=home, fails=True)[0]
    assert "[backup_exists]" in everloop("backup", target, fails=True)[0]


@pytest.fixture
def elsewhere(database_url):
    """The address of an empty database on a server of no stack."""
    url, name = sa.make_url(database_url), f"restored_{os.getpid()}"
    server = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


def test_a_backup_is_restored_into_a_database_elsewhere(taken, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLOOP_DATABASE_URL", elsewhere)
    said = json.loads((taken[0] / MANIFEST).read_text())
    home = tmp_path / "restored"
    _, report = everloop("restore", taken[0], home=home)
    assert report["counts"] == said["counts"] and not list(home.glob("postgres*"))
    sessions = connect(elsewhere, pool_size=1)
    with sessions() as session:
        assert verification.posteriors(session) == said["reward"]
    sessions.kw["bind"].dispose()
    assert "[database_not_empty]" in everloop("restore", taken[0], home=tmp_path / "again", fails=True)[0]


def test_a_server_that_is_too_old_is_told_of_before_anything_is_written(database, monkeypatch):
    with database() as session:
        restoring._check_server(session)
        monkeypatch.setattr(restoring, "OLDEST_SERVER", 99_00_00)
        with pytest.raises(SetupError, match="99 or newer") as refused:
            restoring._check_server(session)
    assert refused.value.code == "database_too_old"


def damaged(taken, tmp_path, act):
    copy = tmp_path / "copy"
    shutil.copytree(taken[0], copy)
    act(copy)
    home = tmp_path / "home"
    said, _ = everloop("restore", copy, "--expect", taken[1]["sha256"], home=home, fails=True)
    assert not home.exists() or not any(home.iterdir()), "something was restored"
    return said


def change_manifest(copy, **values):
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda copy: flip(copy / "database.dump"), "backup_changed"),
        (lambda copy: flip(next(copy.rglob("adapter_model.safetensors"))), "backup_changed"),
        (lambda copy: os.truncate(copy / "database.dump", 1000), "backup_truncated"),
        (lambda copy: next(copy.rglob("dataset.jsonl")).unlink(), "backup_truncated"),
        (lambda copy: change_manifest(copy, counts={}), "backup_changed"),
        (lambda copy: change_manifest(copy, format=2), "backup_newer"),
        (lambda copy: (copy / MANIFEST).unlink(), "not_a_backup"),
    ],
)
def test_a_damaged_backup_is_refused_before_anything_is_restored(taken, tmp_path, act, code):
    assert f"[{code}]" in damaged(taken, tmp_path, act)


def test_what_only_the_checks_of_its_content_tell_is_refused_too(taken, tmp_path):
    """Without --expect a manifest may be changed with the files; the database must still say what it says."""
    for values, code in (
        ({"revision": "9999"}, "backup_newer"),
        ({"audit": {"entries": 1, "last_hash": "0" * 64}}, "audit_cut"),
        ({"counts": {"users": 1}}, "backup_differs"),
    ):
        copy, home = tmp_path / code, tmp_path / f"home-{code}"
        shutil.copytree(taken[0], copy)
        change_manifest(copy, **values)
        assert f"[{code}]" in everloop("restore", copy, home=home, fails=True)[0]
        assert not any(home.iterdir())
    learned = json.loads((taken[0] / MANIFEST).read_text())["reward"]
    [facts] = learned.values()
    facts["num_signals"] += 1
    copy = tmp_path / "learned"
    shutil.copytree(taken[0], copy)
    change_manifest(copy, reward=learned)
    assert "[reward_differs]" in everloop("restore", copy, home=tmp_path / "h", fails=True)[0]


def test_whoever_was_forgotten_since_is_forgotten_again(running, taken, tmp_path):
    everloop("users", "forget", "rater-5", "--no-wait")
    everloop("users", "forget", "rater-6", "--no-wait")
    listed = tmp_path / "erasures.json"
    listed.write_text(json.dumps(everloop("users", "erasures")[1]))
    home = tmp_path / "home"
    _, report = everloop("restore", taken[0], "--erasures", listed, home=home)
    assert len(report["forgotten_again"]) == 2
    with opened(home) as (_, session):
        names = set(session.scalars(sa.select(User.user_id).where(User.forgotten_at.is_(None))))
        assert "rater-4" in names and not {"rater-5", "rater-6"} & names
    plain, _ = everloop("restore", taken[0], home=tmp_path / "without")
    assert "is in it again" in plain
    listed.write_text("[]")
    refused, _ = everloop("restore", taken[0], "--erasures", listed, home=tmp_path / "none", fails=True)
    assert "[erasures_invalid]" in refused and not (tmp_path / "none").exists()


def killed(command, there, **environment):
    """Start a command, and kill it as soon as `there` finds something."""
    child = subprocess.Popen(
        [*EVERLOOP, *map(str, command)], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
    )
    while not there():
        assert child.poll() is None, "it had ended before"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_backup_that_is_killed_leaves_nothing_that_looks_like_one(running, tmp_path):
    target = tmp_path / "tuesday"
    killed(["backup", target], lambda: list(tmp_path.glob(".tuesday.partial-*/database.dump")))
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".tuesday.partial-") and not (left / MANIFEST).exists()
    assert "[not_a_backup]" in everloop("restore", left, home=tmp_path / "home", fails=True)[0]
    everloop("backup", target)
    assert {path.name for path in tmp_path.iterdir()} == {"tuesday"}


def test_a_restore_that_is_killed_leaves_a_home_without_a_database_and_is_begun_anew(taken, tmp_path):
    home = tmp_path / "home"
    killed(["restore", taken[0]], lambda: (home / "restoring" / "postgres").exists(), EVERLOOP_HOME=str(home))
    assert {path.name for path in home.iterdir()} == {"restoring"}
    _, report = everloop("restore", taken[0], home=home)
    assert report["counts"]["signals"] > 0 and (home / "postgres" / "PG_VERSION").exists()
    assert not (home / "restoring").exists()


def test_a_broken_adapter_is_told_and_does_not_keep_the_rest_from_being_kept(running, tmp_path):
    settings, _ = running
    [digest] = open_store(settings).digests()
    weights = Path(open_store(settings).place(digest)) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    try:
        _, told = everloop("backup", tmp_path / "wednesday")
    finally:
        weights.write_bytes(whole)
    assert told["missing_adapters"] == [digest]
    _, report = everloop("restore", tmp_path / "wednesday", home=tmp_path / "home")
    assert report["missing_adapters"] == [digest] and report["adapters"] == 0
