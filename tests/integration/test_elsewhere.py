"""The tests run against parts that somebody else started, and leave nothing there."""

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import prefect_view, worker
from infra.doctor import services
from infra.events import TOPICS
from infra.settings import Settings
from infra.stack import embedded
from infra.stack.parts import embedded_parts
from tests import elsewhere
from tests.conftest import wait_until

TESTS = (
    "tests/integration/test_feedback.py",
    "tests/integration/test_receipts.py",
    "tests/integration/test_book.py",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A PostgreSQL and a broker of no stack; what a test run must be told of them."""
    home = tmp_path_factory.mktemp("cluster")
    settings, _ = embedded.with_addresses(
        Settings(
            home=home, database_url=None, kafka_bootstrap=None, engine_url="http://unused", prefect_url="unused"
        )
    )
    embedded.init_postgres(settings)
    parts = embedded_parts(settings, {"database_url", "kafka_bootstrap"})
    servers = []
    for part in (part for part in parts if part.name in ("postgres", "broker")):
        log = (home / f"{part.name}.log").open("w")
        servers.append(
            subprocess.Popen(part.command, stdout=log, stderr=log, env=os.environ | {**part.environment})
        )
    wait_until(lambda: embedded.database_answers(settings), what="PostgreSQL did not start")
    yield {
        "EVERLOOP_TEST_KAFKA": settings.need("kafka_bootstrap"),
        "EVERLOOP_TEST_DATABASE": settings.need("database_url"),
    }
    for server in servers:
        server.terminate()
        server.wait(30)


@pytest.fixture
def prefect_url(tmp_path):
    """A Prefect server of no stack."""
    settings, _ = embedded.with_addresses(Settings(home=tmp_path))
    part = next(part for part in embedded_parts(settings, {"prefect_url"}) if part.name == "prefect")
    environment = {**os.environ, **part.environment}
    del environment["PREFECT_SERVER_API_AUTH_STRING"], environment["PREFECT_API_AUTH_STRING"]
    with (tmp_path / "prefect.log").open("w") as log:
        server = subprocess.Popen(part.command, env=environment, stdout=log, stderr=log)
    try:
        url = settings.need("prefect_url")
        wait_until(
            lambda: embedded._answers(f"{url}/health"), timeout_s=90, what=f"Prefect did not start: {log.name}"
        )
        yield url
    finally:
        server.terminate()
        server.wait(30)


def run(cluster, *arguments):
    """Run pytest on the cluster; return its exit status and what it said."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=inherited | cluster, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def databases(cluster):
    engine = sa.create_engine(cluster["EVERLOOP_TEST_DATABASE"])
    with engine.connect() as connection:
        names = set(connection.scalars(sa.text("SELECT datname FROM pg_database WHERE NOT datistemplate")))
    engine.dispose()
    return names


@pytest.mark.slow
def test_the_same_tests_run_on_a_cluster_and_leave_nothing_there(cluster):
    before = databases(cluster)
    status, said = run(cluster, *TESTS)
    assert status == 0, said[-4000:]
    assert databases(cluster) == before
    admin = KafkaAdminClient(bootstrap_servers=cluster["EVERLOOP_TEST_KAFKA"])
    assert not set(TOPICS).intersection(admin.list_topics())
    admin.close()


def test_a_database_of_the_runs_own_is_made_on_the_server(cluster):
    with elsewhere.own_database(cluster["EVERLOOP_TEST_DATABASE"]) as url:
        name = sa.make_url(url).database
        assert name in databases(cluster) and name.startswith("everloop_test_")
    assert name not in databases(cluster)


def test_what_an_address_asks_of_the_connection_is_asked(database_url):
    for asked, is_met in (("prefer", True), ("require", False)):  # the embedded PostgreSQL has no certificate
        settings = Settings(home="/nowhere", database_url=f"{database_url}?sslmode={asked}")
        assert embedded.database_answers(settings) is is_met


def test_a_cluster_that_serves_an_everloop_is_refused(cluster):
    admin = KafkaAdminClient(bootstrap_servers=cluster["EVERLOOP_TEST_KAFKA"])

    admin.create_topics([NewTopic(TOPICS[0], 1, 1)])
    try:
        with pytest.raises(pytest.exit.Exception) as refused, elsewhere.own_topics(cluster["EVERLOOP_TEST_KAFKA"]):
            pass
        assert TOPICS[0] in str(refused.value)
        assert TOPICS[0] in admin.list_topics(), "what others have there stays"
    finally:
        admin.delete_topics([TOPICS[0]])
        admin.close()


def test_what_has_a_schedule_is_scheduled_and_doctor_says_where_nothing_is(prefect_url, tmp_path):
    settings = Settings(home=tmp_path, prefect_url=prefect_url)

    def schedules():
        [found] = [finding for finding in services.check_http(settings) if finding.name == "schedules"]
        return found

    assert schedules().verdict == "warn"
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True):
        worker.register(settings)
        wait_until(
            lambda: all(row["next"] for row in prefect_view.overview(settings)), 90, "something is not scheduled"
        )
    assert schedules().verdict == "ok"


@pytest.mark.slow
def test_a_prefect_is_left_without_our_pool_and_refused_with_it(prefect_url, tmp_path):
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:

        def pools():
            return {pool.name for pool in client.read_work_pools()}

        with elsewhere.own_flows(prefect_url):
            worker.register(Settings(home=tmp_path))
            assert elsewhere.POOL in pools() and client.read_deployments()
        assert elsewhere.POOL not in pools() and not client.read_deployments()
        worker.register(Settings(home=tmp_path))
        with pytest.raises(pytest.exit.Exception) as refused, elsewhere.own_flows(prefect_url):
            pass
        assert "everloop" in str(refused.value) and elsewhere.POOL in pools(), "what others have there stays"
