"""The services: ports, database, broker, engines, Prefect, and the clocks of those that tell the time."""

from __future__ import annotations

import contextlib
import email.utils
import socket
import time
from collections.abc import Iterator

import httpx
import psycopg

from infra import pgvector
from infra.db import plain_dsn
from infra.doctor.findings import Finding, Verdict
from infra.settings import Settings
from infra.stack.parts import LOOPBACK
from infra.stack.supervisor import Supervisor

TIMEOUT_S = 2.0
MAX_SKEW_S, WRONG_CLOCK_S = 2.0, 30.0
PORTS = ("api_port", "database_port", "kafka_port", "engine_port", "reward_port", "prefect_port", "metrics_port")
START = "Start one with `everloop up`, or set {setting}."


def is_running(settings: Settings) -> bool:
    """Tell whether an embedded stack runs in this home."""
    return Supervisor(settings).running()


def check_stack(settings: Settings) -> Iterator[Finding]:
    """Find whether the embedded stack runs, each part of it; else whether the ports that are set are free."""
    supervisor = Supervisor(settings)
    if supervisor.running():
        down = [f"{part.name} is {part.state}" for part in supervisor.status() if part.state != "running"]
        if down:
            yield Finding("stack", "fail", ", ".join(down), f"Their last words are in {settings.log_dir}.")
        else:
            restarts = sum(part.restarts for part in supervisor.status())
            told = f"all parts run, {restarts} restarts"
            yield Finding(
                "stack", "warn" if restarts else "ok", told, (restarts and f"See {settings.log_dir}.") or ""
            )
        return
    yield Finding("stack", "ok", "none runs in this home; `everloop up` starts one")
    taken = [name for name in PORTS if (port := getattr(settings, name)) and not _is_free(port)]
    wanted = [name for name in PORTS if getattr(settings, name)]
    for name in taken:
        told = f"{name} {getattr(settings, name)} is taken"
        yield Finding("ports", "fail", told, f"Free it, or set EVERLOOP_{name.upper()} to another.")
    if not taken:
        yield Finding("ports", "ok", f"{', '.join(wanted)} free" if wanted else "none is set; free ones are chosen")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            sock.bind((LOOPBACK, port))
            return True
    return False


def check_database(settings: Settings) -> Iterator[Finding]:
    """Find whether PostgreSQL answers, has the newest tables, and the time."""
    url = settings.database_url
    if url is None:
        return
    dsn = plain_dsn(url)
    try:
        with psycopg.connect(dsn, connect_timeout=2) as connection:
            sent_s = time.time()
            row = connection.execute(
                "SELECT current_setting('server_version'), extract(epoch FROM clock_timestamp())::float8, "
                "to_regclass('alembic_version') IS NOT NULL"
            ).fetchone()
            assert row is not None
            version, theirs_s, has_tables = row
            ours_s = (sent_s + time.time()) / 2
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone() if has_tables else None
            has_index = pgvector.is_ready(connection)
    except psycopg.OperationalError as error:
        why = str(error).strip().splitlines()[0].replace(dsn, "…")
        yield Finding(
            "database", "fail", f"it does not answer: {why}", START.format(setting="EVERLOOP_DATABASE_URL")
        )
        return
    yield _migrated(version, found[0] if found else None)
    if settings.memory_encoder != "off":
        yield _indexed(settings, has_index)
    yield _clock("database", theirs_s - ours_s)


def _migrated(version: str, at: str | None) -> Finding:
    head = newest_migration()
    if at == head:
        return Finding("database", "ok", f"PostgreSQL {version}, migrated to {head}")
    if at is not None and at > head:
        told = f"its tables are of a later version ({at}, this is {head})"
        return Finding("database", "warn", told, "Use the version of Everloop that made them.")
    told = f"PostgreSQL {version}; its tables are {f'of {at}' if at else 'not there'}, {head} is wanted"
    return Finding("database", "fail", told, "`everloop up` migrates it.")


def _indexed(settings: Settings, has_index: bool) -> Finding:
    on = "memory_encoder is on, and words alone find what was said"
    if settings.reward_url is None:
        return Finding("pgvector", "warn", f"{on}: there is no reward worker", "Set EVERLOOP_REWARD_URL.")
    if has_index:
        return Finding("pgvector", "ok", "turns are found by what they say")
    advice = "See that pgvector is installed there, and run `everloop migrate`; `everloop up` does so for its own."
    return Finding("pgvector", "warn", f"{on}: the database has no index of vectors that works", advice)


def newest_migration() -> str:
    """Return the revision that the code's tables are of; revisions are one line, and their files are numbered."""
    from infra.stack import embedded

    migrations = embedded.MIGRATIONS.glob("versions/[0-9]*.py")
    return max(path.name.partition("_")[0] for path in migrations)


def _clock(name: str, ahead_s: float) -> Finding:
    off_s = abs(ahead_s)
    told = f"{name}'s is {off_s:.2f} s {'ahead' if ahead_s > 0 else 'behind'}"
    if off_s < MAX_SKEW_S:
        return Finding("clock", "ok", told)
    advice = "Have both machines set their clocks (NTP): ids, receipts and canaries go by time."
    return Finding("clock", "fail" if off_s > WRONG_CLOCK_S else "warn", told, advice)


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Find whether Kafka answers and has our topics. It has no request that tells the time."""
    bootstrap = settings.kafka_bootstrap
    if bootstrap is None:
        return
    from infra import kafka
    from infra.events import TOPICS

    host, _, port = bootstrap.split(",")[0].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()
        names = kafka.topic_names(bootstrap, TIMEOUT_S, settings.kafka_options)
    except (OSError, ValueError, kafka.KafkaError) as error:
        told = f"{bootstrap} does not answer ({type(error).__name__})"
        yield Finding("broker", "fail", told, START.format(setting="EVERLOOP_KAFKA_BOOTSTRAP"))
        return
    missing = sorted(set(TOPICS) - names)
    if missing:
        yield Finding(
            "broker", "warn", f"{bootstrap} lacks {', '.join(missing)}", "The relay makes them; is it running?"
        )
    else:
        yield Finding("broker", "ok", f"{bootstrap} has all {len(TOPICS)} topics")


def check_engines(settings: Settings) -> Iterator[Finding]:
    """Find whether each engine answers, its version and its clock."""
    urls = [url for url in (settings.engine_url, *settings.engine_replicas) if url]
    for url in urls:
        yield from _engine(url, settings.engine_credentials)


def _engine(url: str, headers: dict[str, str]) -> Iterator[Finding]:
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False, headers=headers) as client:
            sent_s = time.time()
            health = client.get(f"{url}/health")
            version = client.get(f"{url}/version")
    except httpx.HTTPError as error:
        told = f"{url} does not answer ({type(error).__name__})"
        yield Finding("engine", "fail", told, START.format(setting="EVERLOOP_ENGINE_URL"))
        return
    if health.status_code != 200:
        yield Finding("engine", "fail", f"{url} is not well: {health.status_code}", "See its log; restart it.")
        return
    told = version.json().get("version", "of an unknown version") if version.status_code == 200 else ""
    yield Finding("engine", "ok", f"{url} {told}".rstrip())
    theirs = email.utils.parsedate_to_datetime(health.headers["date"]) if "date" in health.headers else None
    if theirs is not None and abs(theirs.timestamp() - sent_s) > MAX_SKEW_S + 1.0:  # it tells whole seconds
        yield _clock("engine", theirs.timestamp() - sent_s)


def check_http(settings: Settings) -> Iterator[Finding]:
    """Find whether the API and Prefect answer."""
    if settings.public_url is not None:
        yield _answers(
            "api", f"{settings.public_url}/v1/deployment", "EVERLOOP_PUBLIC_URL", "fail", settings.credentials
        )
    if settings.prefect_url is not None:
        # Serving and feedback do without it; nights do not.
        found = _answers("prefect", f"{settings.prefect_url}/health", "EVERLOOP_PREFECT_URL", "warn", {})
        yield found
        if found.verdict == "ok":
            yield _schedules(settings.prefect_url, settings.prefect_credentials)


def _schedules(prefect_url: str, headers: dict[str, str]) -> Finding:
    """Find whether any run is to start by schedule: a Prefect that answers may schedule nothing."""
    waiting = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    try:
        asked = httpx.post(
            f"{prefect_url}/flow_runs/count", json=waiting, timeout=TIMEOUT_S, trust_env=False, headers=headers
        )
        if asked.status_code in (401, 403):
            return Finding(
                "schedules",
                "warn",
                "Prefect asks for a password that is not known here",
                "Set EVERLOOP_PREFECT_AUTH.",
            )
        number = int(asked.raise_for_status().json())
    except (httpx.HTTPError, ValueError) as error:
        return Finding("schedules", "warn", f"Prefect does not tell them ({type(error).__name__})", "See its log.")
    if number:
        return Finding("schedules", "ok", f"{number} runs are to start by schedule")
    return Finding(
        "schedules",
        "warn",
        "nothing is to start by schedule, no night either",
        "A minute after a start that is not so: see Prefect's log. `everloop train` starts a night by hand.",
    )


def _answers(name: str, url: str, setting: str, otherwise: Verdict, headers: dict[str, str]) -> Finding:
    try:
        status = httpx.get(url, timeout=TIMEOUT_S, trust_env=False, headers=headers).status_code
    except httpx.HTTPError as error:
        told = f"{url} does not answer ({type(error).__name__})"
        return Finding(name, otherwise, told, START.format(setting=setting))
    if status in (401, 403):
        return Finding(name, "warn", f"{url} does not know this machine's key", "Set EVERLOOP_SERVICE_KEY to one.")
    if status < 500:
        return Finding(name, "ok", url.rpartition("/v1/")[0] if name == "api" else url)
    return Finding(name, otherwise, f"{url}: status {status}", "See its log.")
