"""Whoever watches the API is told what is amiss: the process, the database, or the engine."""

import os
import socket
import subprocess
import sys

import httpx
import pytest
import sqlalchemy as sa

from infra.db import connect
from tests.conftest import EVERLOOP, wait_until

NO_ENGINE = "http://127.0.0.1:9"


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def api(database, tmp_path):
    """An API on a database of the test's own and an engine that is not there; its client, and a way to end it."""
    number = port()
    environment = os.environ | {
        "EVERLOOP_HOME": str(tmp_path),
        "EVERLOOP_DATABASE_URL": database.kw["bind"].url.render_as_string(hide_password=False),
        "EVERLOOP_ENGINE_URL": NO_ENGINE,
        "EVERLOOP_API_PORT": str(number),
    }
    process = subprocess.Popen([sys.executable, "-m", "agent.app"], env=environment)
    with httpx.Client(base_url=f"http://127.0.0.1:{number}", trust_env=False, timeout=30) as client:

        def answers():
            try:
                return client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, what="the API did not start")
        yield client
    process.terminate()
    process.wait(30)


def test_ready_is_who_could_answer(api, database):
    url = database.kw["bind"].url
    no_release = api.get("/readyz")
    assert (no_release.status_code, no_release.json()["error"]["code"]) == (503, "release_loading")
    assert api.get("/readyz/feedback").json() == {"status": "ready"}

    server = connect(url.set(database="postgres").render_as_string(hide_password=False))
    with server.kw["bind"].execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false"))
        ending = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(sa.text(ending), {"name": url.database})
        try:
            for path in ("/readyz", "/readyz/feedback"):
                away = api.get(path)
                assert (away.status_code, away.json()["error"]["code"]) == (503, "database_unavailable")
            assert api.get("/healthz").status_code == 200, "a restart would not bring the database back"
        finally:
            connection.execute(sa.text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true"))
    server.kw["bind"].dispose()
    wait_until(lambda: api.get("/readyz/feedback").status_code == 200, what="ready again")


def test_the_running_stack_is_ready(stack):
    ready = stack.http.get("/readyz")
    assert ready.status_code == 200 and ready.json() == {"status": "ready"}
    assert (stack.settings.run_dir / "relay.alive").exists()


def test_a_database_of_ones_own_is_migrated_by_a_command(database_url, tmp_path):
    server = sa.create_engine(database_url.rpartition("/")[0] + "/postgres", isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE migrated"))
        try:
            url = f"{database_url.rpartition('/')[0]}/migrated"
            environment = os.environ | {"EVERLOOP_HOME": str(tmp_path), "EVERLOOP_DATABASE_URL": url}
            for _ in range(2):
                done = subprocess.run([*EVERLOOP, "migrate"], env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            engine = sa.create_engine(url)
            assert "episodes" in sa.inspect(engine).get_table_names()
            engine.dispose()
            environment["EVERLOOP_DATABASE_URL"] = url.replace("127.0.0.1", "127.0.0.9")
            away = subprocess.run(
                [*EVERLOOP, "migrate", "--wait", "0"], env=environment, capture_output=True, text=True
            )
            assert away.returncode == 1 and "[database_unavailable]" in away.stderr
        finally:
            connection.execute(sa.text("DROP DATABASE migrated WITH (FORCE)"))
    server.dispose()
