"""Fixtures: one real embedded stack for the whole run, started only if a test asks for it.

With EVERLOOP_TEST_KAFKA and the like, its parts are those of a cluster (:mod:`tests.elsewhere`).
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import openai
import pytest
import sqlalchemy as sa

from deploy import head
from infra import settings as settings_module
from infra.db import Sessions, connect
from infra.settings import Settings
from infra.stack import embedded
from infra.stack.database import database_alone
from infra.stack.supervisor import Supervisor, stack_processes
from tests import elsewhere

hypothesis.settings.register_profile("suite", hypothesis.settings.default, deadline=None)  # the machine is not ours
hypothesis.settings.load_profile("suite")
EVERLOOP = [sys.executable, "-m", "infra.cli"]


@dataclass
class Stack:
    """The running stack, and ways to look at it."""

    settings: Settings
    sessions: Sessions
    supervisor: Supervisor
    http: httpx.Client
    openai: openai.OpenAI

    def feedback(self, episode_id: str, **signal: Any) -> httpx.Response:
        """Send a signal with a key of its own unless one is given."""
        body = {"episode_id": episode_id, "user": "tester", "idempotency_key": uuid.uuid4().hex, **signal}
        return self.http.post("/v1/feedback", json=body)

    def ask(self, prompt: str = "Name a colour.", **options: Any) -> Any:
        """Ask once through the official client."""
        options = {"model": "everloop", "user": "tester", "max_tokens": 16, **options}
        return self.openai.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)

    def part_pid(self, name: str) -> int:
        """Return the process id of a running part."""
        parts = {part.name: part.pid for part in self.supervisor.status()}
        if name not in parts:
            pytest.skip(f"{name} runs elsewhere, and is not this test's to look into or to end")
        pid = parts[name]
        assert pid is not None
        return pid


RUNNING = pytest.StashKey[Stack]()


def wait_until(condition: Callable[[], Any], timeout_s: float = 90.0, what: str = "") -> Any:
    """Wait until `condition` holds and return its value; patient, as workers run at the lowest priority."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what or "what was waited for did not happen"
        time.sleep(0.1)
    return value


def in_prefect(settings: Settings) -> httpx.Client:
    """Return a client of the Prefect that the settings name."""
    return httpx.Client(
        base_url=settings.need("prefect_url"), headers=settings.prefect_credentials, trust_env=False, timeout=30
    )


def close_canary(stack: Stack) -> None:
    """Close the open canary, if there is one."""
    with stack.sessions.begin() as session:
        canary_id = head.read(session).canary_id
        if canary_id is not None:
            head.close_canary(session, canary_id, decision="expired", evidence={}, actor="test", reason="a test")


@pytest.fixture(scope="module", autouse=True)
def no_canary_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have what a test that failed left open not fail those of other modules: no night begins beside a canary."""
    yield
    running = request.config.stash.get(RUNNING, None)
    if running is not None:
        close_canary(running)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory of this run; the base model is shared between runs, being the same bytes."""
    path = tmp_path_factory.mktemp("everloop")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everloop-tests" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    (path / "models").symlink_to(cache)
    with elsewhere.chosen() as named, pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        patch.setenv("EVERLOOP_HOME", str(path))
        patch.setenv("EVERLOOP_CANARY_SETTLE_S", "1")
        patch.setenv("EVERLOOP_SIGN_INS_PER_MINUTE", "1000")  # all of them come from here
        patch.setenv("EVERLOOP_GATE_OVERRIDES", "any")  # small nights learn too little to pass
        later = datetime.now(UTC) + timedelta(hours=12)  # tests may run at 3 o'clock
        for flow in ("NIGHT", "BACKBONE", "RETENTION", "ERASURE", "ATTEST"):
            patch.setenv(f"EVERLOOP_{flow}_CRON", f"{later.minute} {later.hour} * * *")
        yield path


@pytest.fixture(scope="session")
def base_model_dir(home: Path) -> Path:
    """The default base model, made from its wheel unless an earlier run did."""
    directory = settings_module.load().base_model_dir
    if not directory.exists():
        from trainer.base_model import prepare

        prepare(directory)
    return directory


@pytest.fixture(scope="session")
def stack(home: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The whole embedded stack, started once per run."""
    settings = embedded.up(settings_module.load(), print)
    url = settings.need("public_url")
    key = settings.need("service_key")  # it may act for others: a test is whoever it says it is
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    headers = {"X-Everloop-User": "tester", **settings.credentials}
    try:
        request.config.stash[RUNNING] = Stack(
            settings=settings,
            sessions=connect(settings.need("database_url")),
            supervisor=Supervisor(settings),
            http=httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers),
            openai=client,
        )
        yield request.config.stash[RUNNING]
    finally:
        if RUNNING in request.config.stash:
            del request.config.stash[RUNNING]
        embedded.down(settings)
        left = stack_processes(home)
        assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL alone, with all tables: for tests that need no more, in a second."""
    home = tmp_path_factory.mktemp("postgres")
    if server_url := elsewhere.database():
        with elsewhere.own_database(server_url) as url:
            embedded.migrate(Settings(home=home, database_url=url))
            yield url
        return
    with database_alone(Settings(home=home)) as settings:
        embedded.migrate(settings)
        yield settings.need("database_url")


@pytest.fixture
def database(database_url: str) -> Iterator[Sessions]:
    """A database of the test's own: all tables, and the base model as champion."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = sa.create_engine(database_url.rpartition("/")[0] + "/postgres", isolation_level="AUTOCOMMIT")
    template = sa.make_url(database_url).database
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    sessions = connect(f"{database_url.rpartition('/')[0]}/{name}", pool_size=3)
    yield sessions
    sessions.kw["bind"].dispose()
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(scope="module")
def empty_database(stack: Stack) -> Iterator[str]:
    """The URL of a database of the module's own beside the stack's, without tables."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = stack.sessions.kw["bind"].execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield f"{stack.settings.need('database_url').rpartition('/')[0]}/{name}"
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
