"""``everloop backup``: one snapshot of the database, then the files that it names.

Files never change under their digest, so those that the snapshot names may be copied after it, while people chat.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit
from deploy.store import open_store
from deploy.tables import Adapter
from feedback.tables import Episode, Erasure, Feedback, User
from flows.backup.manifest import ADAPTERS, BACKBONES, DATABASE, DATASETS, RUNS, SETTINGS, Manifest
from flows.housekeeping import LOCK
from infra.db import LongLock, Sessions, connect
from infra.errors import ConflictError, IntegrityError, SetupError, UnavailableError
from infra.settings import Settings
from infra.stack.parts import postgres_bin
from reward import verification
from trainer.record import CONFIG_FILE

LOCK_TIMEOUT_S = 60.0
PARTIAL = ".partial-"
SECRET = re.compile(r"(^|_)(secret|password|passphrase|credentials?|token|keys?|auth|options)(_|$)", re.IGNORECASE)
URL_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")
SETTINGS_FILES = ("everloop.toml", "training.toml")
METRICS_FILE = "metrics.jsonl"
COUNTED = {"users": User, "episodes": Episode, "signals": Feedback, "adapters": Adapter, "erasures": Erasure}
Say = Callable[[str], None]


def take(settings: Settings, target: Path, say: Say) -> tuple[Manifest, str]:
    """Write a backup to a directory that is not there yet; return its manifest, and that file's SHA-256.

    Raises
    ------
    ConflictError
        Code ``backup_exists``; it overwrites nothing.
    SetupError
        Code ``backup_failed``, with what PostgreSQL or the disk said; then nothing is left of it.
    """
    if target.exists() or target.is_symlink():
        raise ConflictError(f"{target} is there already; name a new directory.", code="backup_exists")
    sessions = connect(settings.need("database_url"), pool_size=2)
    with _staging(target) as staging, _nothing_deleted(sessions):
        say("database: one snapshot")
        with _snapshot(sessions) as (session, name):
            dump(settings, staging / DATABASE, name)
            manifest = _manifest(session, settings)
            digests = list(session.scalars(sa.select(Adapter.digest).where(Adapter.files_deleted_at.is_(None))))
        say(f"{len(digests)} adapters, and what else the database names")
        manifest.missing_adapters = _copy_adapters(settings, digests, staging / ADAPTERS)
        _copy_files(settings, staging)
        manifest.left_out = _copy_settings(settings, staging / SETTINGS)
        say("hashing")
        digest = manifest.write(staging)
        _to_disk(staging)
        staging.rename(target)
    return manifest, digest


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a directory beside the target, readable by its owner only; what dead processes left there goes."""
    prefix = f".{target.name}{PARTIAL}"
    for left in target.parent.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(left.name.removeprefix(prefix))):
            shutil.rmtree(left, ignore_errors=True)
    staging = target.parent / f"{prefix}{os.getpid()}"
    try:
        staging.mkdir(mode=0o700)
        yield staging
    except OSError as error:
        raise SetupError(
            f"The backup could not be written: {error}. Nothing is left of it.", code="backup_failed"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _nothing_deleted(sessions: Sessions) -> Iterator[None]:
    """Keep retention from deleting files that the snapshot names."""
    with LongLock(sessions, LOCK) as lock:
        until_s = time.monotonic() + LOCK_TIMEOUT_S
        while not lock.take():
            if time.monotonic() > until_s:
                raise UnavailableError("Retention is at work; try again in a minute.", code="housekeeping_busy")
            time.sleep(0.2)
        yield


@contextmanager
def _snapshot(sessions: Sessions) -> Iterator[tuple[Session, str]]:
    """Open a transaction that sees one moment, and yield it with a name under which others see the same."""
    engine: sa.Engine = sessions.kw["bind"]
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        session = Session(connection)
        yield session, str(session.scalar(sa.text("SELECT pg_export_snapshot()")))


def dump(settings: Settings, file: Path, snapshot: str) -> None:
    """Have ``pg_dump`` write the database as a snapshot shows it."""
    command = ["pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}"]
    run_tool(settings, [*command, f"--file={file}"])
    file.chmod(0o600)


def run_tool(settings: Settings, command: list[str]) -> str:
    """Return what a program of PostgreSQL's says of the database; its password stays out of the list of processes.

    Raises
    ------
    SetupError
        Code ``backup_failed``, with its last words.
    """
    url = sa.make_url(settings.need("database_url"))
    where = {"PGHOST": url.host, "PGPORT": url.port, "PGUSER": url.username, "PGPASSWORD": url.password}
    given = {name: str(value) for name, value in where.items() if value is not None}
    given |= {"PGDATABASE": str(url.database)}
    program = str(postgres_bin() / command[0])
    done = subprocess.run([program, *command[1:]], env={**os.environ, **given}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"{command[0]} failed: {done.stderr.strip()[-500:]}", code="backup_failed")
    return done.stdout


def _manifest(session: Session, settings: Settings) -> Manifest:
    chain = audit.verify(session)
    return Manifest(
        everloop=version("everloop"),
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=str(session.scalar(sa.text("SELECT version_num FROM alembic_version"))),
        home=str(settings.home),
        audit={"entries": chain.entries, "last_hash": chain.last_hash},
        reward=verification.posteriors(session),
        counts=counts(session),
    )


def counts(session: Session) -> dict[str, int]:
    """Return how many rows there are of what people, and runs, have written."""
    return {name: session.scalar(sa.select(sa.func.count()).select_from(t)) or 0 for name, t in COUNTED.items()}


def _copy_adapters(settings: Settings, digests: list[str], target: Path) -> list[str]:
    """Copy adapters out of the store, each checked against its digest; return those that are broken there."""
    store = open_store(settings)
    missing = []
    for digest in digests:
        try:
            _copy(store.fetch(digest), target / digest)
        except IntegrityError:  # it was before, and a backup of all the rest is worth more than none
            missing.append(digest)
    return missing


def _copy_files(settings: Settings, staging: Path) -> None:
    """Copy what trained backbones and runs left; of runs what pages show, and nothing that quotes people."""
    for directory, name in ((settings.backbones_dir, BACKBONES), (settings.datasets_dir, DATASETS)):
        for path in directory.glob("[!.]*"):
            if path.is_dir():
                _copy(path, staging / name / path.name)
    for run in settings.runs_dir.glob("run_*"):
        for file in (CONFIG_FILE, METRICS_FILE):
            with suppress(FileNotFoundError):
                (staging / RUNS / run.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / file, staging / RUNS / run.name / file)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))


def _copy_settings(settings: Settings, target: Path) -> list[str]:
    """Copy the home's settings without secrets; return what was left out."""
    target.mkdir()
    left_out: list[str] = []
    for name in SETTINGS_FILES:
        path = settings.home / name
        if not path.exists():
            continue
        text = path.read_text()
        given = tomllib.loads(text)
        secret = [key for key, value in given.items() if is_secret(key, value)]
        if secret:  # comments go with it: one of them may hold what the setting held before
            text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in given.items() if k not in secret)
        (target / name).write_text(text)
        left_out += secret
    return left_out


def is_secret(key: str, value: Any) -> bool:
    """Tell whether a setting holds what nobody may read who finds a backup."""
    return bool(SECRET.search(key) or isinstance(value, dict) or URL_WITH_PASSWORD.search(str(value)))


def _to_disk(directory: Path) -> None:
    """Have all files on the disk before the directory gets its name."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            with path.open("rb") as file:
                os.fsync(file.fileno())
