"""Clusters for a test run: EVERLOOP_TEST_KAFKA, _DATABASE, _ENGINE and _PREFECT; embedded parts where unset.

A real one is not spoilt: each run has a database of its own on the server, and a Kafka cluster that has Everloop's
topics already, or a Prefect that has its work pool, is refused; what the run made there is deleted at its end. The
engine must see the run's home, which adapters are loaded from, and serve the default base model.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import sqlalchemy as sa
from kafka import KafkaAdminClient

from infra.events import TOPICS, dead_letter_topic

POOL = "everloop"
SETTINGS = {
    "EVERLOOP_TEST_KAFKA": "EVERLOOP_KAFKA_BOOTSTRAP",
    "EVERLOOP_TEST_ENGINE": "EVERLOOP_ENGINE_URL",
    "EVERLOOP_TEST_PREFECT": "EVERLOOP_PREFECT_URL",
}


def database() -> str | None:
    """Return the URL of the PostgreSQL server that tests are to use."""
    return os.environ.get("EVERLOOP_TEST_DATABASE")


@contextmanager
def chosen() -> Iterator[dict[str, str]]:
    """Return the settings that put a stack on what the environment names."""
    named = {setting: os.environ[name] for name, setting in SETTINGS.items() if name in os.environ}
    with ExitStack() as held:
        if database():
            named["EVERLOOP_DATABASE_URL"] = held.enter_context(own_database(database()))
        if "EVERLOOP_KAFKA_BOOTSTRAP" in named:
            held.enter_context(own_topics(named["EVERLOOP_KAFKA_BOOTSTRAP"]))
        if "EVERLOOP_PREFECT_URL" in named:
            held.enter_context(own_flows(named["EVERLOOP_PREFECT_URL"]))
        yield named


@contextmanager
def own_database(url: str) -> Iterator[str]:
    """Make a database on the server of `url`, and drop it at the end."""
    name = f"everloop_test_{uuid.uuid4().hex[:12]}"
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield server.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


@contextmanager
def own_topics(bootstrap: str) -> Iterator[None]:
    """Leave a cluster without Everloop's topics; one that has them serves somebody."""
    ours = {name for topic in TOPICS for name in (topic, dead_letter_topic(topic))}
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        if taken := sorted(ours.intersection(admin.list_topics())):
            pytest.exit(
                f"EVERLOOP_TEST_KAFKA={bootstrap} has the topic {taken[0]}: an Everloop uses it, or a test run "
                "that was killed left it. Name a cluster without, or delete its topics.",
                returncode=2,
            )
        try:
            yield
        finally:
            if made := sorted(ours.intersection(admin.list_topics())):
                admin.delete_topics(made)
    finally:
        admin.close()


@contextmanager
def own_flows(api: str) -> Iterator[None]:
    """Leave a Prefect without Everloop's work pool and deployments; one that has them runs somebody's nights."""
    pool = f"/work_pools/{POOL}"
    with httpx.Client(base_url=api, trust_env=False, timeout=30) as client:
        if client.get(pool).status_code == 200:
            pytest.exit(
                f"EVERLOOP_TEST_PREFECT={api} has the work pool {POOL}: an Everloop uses it, or a test run "
                "that was killed left it. Name another, or delete the pool.",
                returncode=2,
            )
        try:
            yield
        finally:
            ours = {"work_pools": {"name": {"any_": [POOL]}}}
            for deployment in client.post("/deployments/filter", json=ours).json():
                client.delete(f"/deployments/{deployment['id']}")
            client.delete(pool)
