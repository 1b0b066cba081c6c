"""``everloop restore``: a backup into an empty home, checked before it has any effect, and after.

All is built in a directory within the home, and moved into place at the end, the database last: a restore that was
killed leaves a home without one, and the next begins anew.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit
from deploy.store import MANIFEST as ADAPTER_FACTS
from deploy.store import open_store
from feedback import erasure
from feedback.tables import User
from flows.backup import manifest as manifests
from flows.backup.manifest import ADAPTERS, BACKBONES, DATABASE, DATASETS, RUNS, SETTINGS, Manifest
from flows.backup.taking import counts, run_tool
from infra import pgvector
from infra.db import connect
from infra.errors import ConflictError, IntegrityError, InvalidRequestError, SetupError
from infra.settings import Settings, load
from infra.stack.database import database_alone
from infra.stack.embedded import alembic_config, migrate
from infra.stack.supervisor import stack_processes
from reward import verification
from reward.tables import RewardEncoder

STAGING = "restoring"
OLDEST_SERVER = 17_00_00
ALLOWED = {"everloop.toml", "training.toml", "models", STAGING}
LAST = ("postgres.password", "postgres")
PG_RESTORE = ("pg_restore", "--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
MADE_ANEW = re.compile(
    rf"EXTENSION - {pgvector.EXTENSION}|- EXTENSION {pgvector.EXTENSION} |INDEX public {pgvector.INDEX} "
)
Say = Callable[[str], None]


def restore(source: Path, say: Say, *, expected: str | None = None, erasures: Path | None = None) -> dict[str, Any]:
    """Restore a backup into the home of the settings.

    Parameters
    ----------
    expected
        SHA-256 of its manifest, as it was told when it was taken.
    erasures
        Who was forgotten since: a file of :func:`feedback.erasure.all_erasures`. They are forgotten again.

    Returns
    -------
    dict
        What was checked, and what has to be done by hand.

    Raises
    ------
    ConflictError
        Codes ``home_not_empty`` and ``database_not_empty``.
    SetupError
        Code ``database_too_old``.
    IntegrityError
        Codes ``backup_changed``, ``backup_truncated``, ``backup_differs``, ``audit_changed`` and others of the
        checks; then nothing was restored.
    """
    found = manifests.read(source, expected)
    forgotten = _read_erasures(erasures)
    home = load(recorded_addresses=False).home
    _check_empty(home)
    staging = home / STAGING
    for process in stack_processes(staging):  # of a restore that was killed
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700, parents=True)
    try:
        report = _build(source, found, home, staging, forgotten, say)
        _move(staging, home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _build(
    source: Path, found: Manifest, home: Path, staging: Path, forgotten: Sequence[dict[str, str]], say: Say
) -> dict[str, Any]:
    say("files: checked against their digests, copying")
    _copy_settings(source / SETTINGS, home, staging)
    for name in (BACKBONES, DATASETS, RUNS):
        if (source / name).exists():
            shutil.copytree(source / name, staging / name)
    settings = load(recorded_addresses=False).model_copy(update={"home": staging})
    num_adapters = _put_adapters(settings, source / ADAPTERS)
    with database_alone(settings) as settings:
        _check_revision(settings, found.revision)
        sessions = connect(settings.need("database_url"), pool_size=2)
        with sessions() as session:
            _check_server(session)
            _check_no_tables(session)
        say("database: restoring")
        put_database(settings, source / DATABASE)
        migrate(settings)
        say("checking the audit log and the reward model")
        with sessions.begin() as session:
            checked = _check(session, found)
            _rebase_places(session, found.home, home)
            again = [_forget(session, row) for row in forgotten]
        sessions.kw["bind"].dispose()
    return {
        "taken_at": found.taken_at,
        **checked,
        "adapters": num_adapters,
        "missing_adapters": found.missing_adapters,
        "forgotten_again": [erasure_id for erasure_id in again if erasure_id],
        "settings_to_set_again": found.left_out,
    }


def put_database(settings: Settings, file: Path) -> None:
    """Have ``pg_restore`` write a dump into the database, but for what ``migrate`` makes where it is wanted.

    An extension can only be made where the server has it, and by some users only.
    """
    contents = run_tool(settings, ["pg_restore", "--list", str(file)]).splitlines()
    wanted = [line for line in contents if not MADE_ANEW.search(line)]
    with tempfile.NamedTemporaryFile("w") as listed:
        listed.write("\n".join(wanted))
        listed.flush()
        database = sa.make_url(settings.need("database_url")).database
        run_tool(settings, [*PG_RESTORE, f"--dbname={database}", f"--use-list={listed.name}", str(file)])


def _check_empty(home: Path) -> None:
    there = {path.name for path in home.iterdir()} if home.is_dir() else set()
    if left := sorted(there - ALLOWED):
        raise ConflictError(
            f"{home} is not empty ({', '.join(left[:5])}). Restore into a home of its own: set EVERLOOP_HOME to a "
            "new directory.",
            code="home_not_empty",
        )


def _check_revision(settings: Settings, revision: str) -> None:
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        ScriptDirectory.from_config(alembic_config(settings)).get_revision(revision)
    except CommandError as error:
        raise manifests.newer(f"its schema is {revision}, which this version does not know") from error


def _check_server(session: Session) -> None:
    version = int(session.scalar(sa.text("SHOW server_version_num")) or 0)
    if version < OLDEST_SERVER:  # it does not know all that our pg_restore says first
        raise SetupError(
            f"The database that database_url names is of PostgreSQL {version // 10000}; a backup is restored into "
            f"{OLDEST_SERVER // 10000} or newer. Name another server.",
            code="database_too_old",
        )


def _check_no_tables(session: Session) -> None:
    count = "SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
    if session.scalar(sa.text(count)):
        raise ConflictError(
            "The database that database_url names has tables already. Restore into a new, empty one.",
            code="database_not_empty",
        )


def _copy_settings(source: Path, home: Path, staging: Path) -> None:
    """Take the backup's settings where the home has none of its own."""
    for path in source.iterdir():
        if not (home / path.name).exists():
            shutil.copyfile(path, staging / path.name)


def _put_adapters(settings: Settings, source: Path) -> int:
    """Put adapters into the store, each under its digest, and check them there; return how many."""
    store = open_store(settings)
    directories = sorted(source.iterdir()) if source.exists() else []
    for directory in directories:
        with store.staged(directory) as staged:
            for extra in directory.iterdir():  # its card, and what is known of where it comes from
                if not (staged / extra.name).exists():
                    shutil.copyfile(extra, staged / extra.name)
            store.put(staged, directory.name, json.loads((directory / ADAPTER_FACTS).read_text()))
        store.fetch(directory.name)
    return len(directories)


def _check(session: Session, found: Manifest) -> dict[str, Any]:
    chain = audit.verify(session, found.audit["last_hash"] or None)
    now = counts(session)
    if now != found.counts or chain.entries != found.audit["entries"]:
        raise IntegrityError(
            f"The database holds {now} and {chain.entries} audit entries; the backup says {found.counts} and "
            f"{found.audit['entries']}. Nothing was restored; use another backup.",
            code="backup_differs",
        )
    return {"audit_entries": chain.entries, "counts": now, "reward": verification.verify(session, found.reward)}


def _rebase_places(session: Session, old_home: str, home: Path) -> None:
    """Have rows that name places in the old home name the new one."""
    path = RewardEncoder.adapter_path
    within = path.startswith(f"{old_home}/", autoescape=True)
    moved = sa.func.concat(str(home), sa.func.substr(path, len(old_home) + 1))
    session.execute(sa.update(RewardEncoder).where(within).values(adapter_path=moved))


def _read_erasures(file: Path | None) -> list[dict[str, str]]:
    if file is None:
        return []
    try:
        rows = json.loads(file.read_text())["erasures"]
        return [{"key_id": row["key_id"], "policy": row["policy"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{file} is no list of erasures; `everloop users erasures --json FILE` writes one.",
            code="erasures_invalid",
        ) from error


def _forget(session: Session, row: dict[str, str]) -> str | None:
    """Forget whose key this is, where the backup still knows them; the other rooms do their part when they run."""
    known = sa.select(User.user_id).where(User.key_id == row["key_id"], User.forgotten_at.is_(None))
    user_id = session.scalar(known)
    return erasure.forget(session, user_id, row["policy"]) if user_id is not None else None


def _move(staging: Path, home: Path) -> None:
    """Move all into place, the database last: before that the home has none."""
    names = [path.name for path in staging.iterdir() if path.name not in (*LAST, "run", "logs")]
    for name in [*names, *LAST]:
        if (staging / name).exists():
            (staging / name).rename(home / name)
