"""Pages stay quick however much there is: indexes, keyset pages, partitions by month."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from feedback import partitions
from feedback.tables import Episode, Feedback
from infra.ids import first_id, new_id, time_of

USER = "reader-of-many-pages"
FEW, MILLION = 20_000, 1_000_000


def fill(stack, num_episodes):
    """Write episodes and a signal each, of one reader in fifty, straight into the tables."""
    with stack.sessions.begin() as session:
        session.execute(
            sa.text("INSERT INTO subject_keys (key_id, key) VALUES ('sk_pages', '\\x00') ON CONFLICT DO NOTHING")
        )
        for number in range(50):
            user = USER if number == 0 else f"{USER}-{number}"
            statement = sa.text(
                "INSERT INTO users (user_id, key_id) VALUES (:u, 'sk_pages') ON CONFLICT DO NOTHING"
            )
            session.execute(statement, {"u": user})
    now = datetime.now(UTC)
    earlier = max(now - timedelta(hours=1), now.replace(day=1, hour=0, minute=0))  # what is recent is counted
    low = int(first_id("ep", earlier)[3:], 16)
    for start in range(0, num_episodes, 50_000):
        with stack.sessions.begin() as session:
            session.execute(
                _EPISODES, {"low": low, "start": start, "end": min(start + 50_000, num_episodes) - 1, "user": USER}
            )
    with stack.sessions.begin() as session:
        session.execute(_SIGNALS, {"user": USER})
    with stack.sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))


_EPISODES = sa.text("""
    INSERT INTO episodes (id, user_id, release, arm, propensity, messages, answer, status, sampling, token_ids,
                          logprobs, num_prompt_tokens, latency_ms, learn)
    SELECT 'ep_' || lpad(to_hex(CAST(:low AS bigint)), 12, '0') || lpad(to_hex(n), 20, '0'),
           CASE WHEN n % 50 = 0 THEN :user ELSE :user || '-' || n % 50 END, 'base', 'champion', 1.0,
           '[{"role": "user", "content": "Why?"}]', 'Because of ' || n, 'complete', '{}', '{}', '{}', 1, 1.0, false
    FROM generate_series(CAST(:start AS int), CAST(:end AS int)) AS n
""")
_SIGNALS = sa.text("""
    INSERT INTO feedback (id, episode_id, user_id, kind, slot, value, idempotency_key, body_digest)
    SELECT 'fb_' || substr(id, 4), id, user_id, 'thumb', id, 1, id, '' FROM episodes
    WHERE user_id LIKE :user || '%' ON CONFLICT DO NOTHING
""")


@pytest.fixture(scope="module")
def many(stack):
    fill(stack, FEW)
    yield
    with stack.sessions.begin() as session:
        for table in (Feedback, Episode):
            session.execute(sa.delete(table).where(table.user_id.startswith(USER)))


def plans(stack, path, **query):
    """Return the plans of the statements that a request makes, by the statements' own text."""
    statements = []

    def note(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    from fastapi.testclient import TestClient

    from agent.app import build_app

    with TestClient(build_app(stack.settings)) as client:
        engine = client.app.state.sessions.kw["bind"]
        sa.event.listen(engine, "before_cursor_execute", note)
        response = client.get(path, params=query, headers={"X-Everloop-User": USER, **stack.settings.credentials})
        assert response.status_code == 200, response.text
        sa.event.remove(engine, "before_cursor_execute", note)
        found = []
        with engine.connect() as connection:
            for statement, parameters in statements:
                cursor = connection.connection.cursor()
                cursor.execute("EXPLAIN (FORMAT JSON) " + statement, parameters)
                (plan,) = cursor.fetchone()
                found.append(plan if isinstance(plan, list) else json.loads(plan))
    is_json = response.headers["content-type"].startswith("application/json")
    return response.json() if is_json else response.text, list(nodes(found))


def nodes(plan):
    """Yield every node of a plan."""
    if isinstance(plan, list):
        for part in plan:
            yield from nodes(part)
    elif isinstance(plan, dict):
        if "Node Type" in plan:
            yield plan
        for value in plan.values():
            if isinstance(value, dict | list):
                yield from nodes(value)


@pytest.fixture
def reads_whole(stack, many):
    """Return a function that names the large tables which plans read as a whole; the months to come are empty."""
    with stack.sessions() as session:
        filled = sa.text("""
            SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples >= :few
            AND (relname = 'feedback' OR relname LIKE 'episodes\\_%')
        """)
        large = set(session.scalars(filled, {"few": FEW // 50}))
    assert len(large) >= 2

    def of(found):
        return [n["Relation Name"] for n in found if n["Node Type"] == "Seq Scan" and n["Relation Name"] in large]

    return of


def test_every_page_is_served_by_indexes(stack, reads_whole):
    page, found = plans(stack, "/v1/episodes", limit=100)
    assert len(page["data"]) == 100 and reads_whole(found) == []
    last = page["next_before"]
    deep, found = plans(stack, "/v1/episodes", limit=100, before=last)
    assert deep["data"][0]["id"] < last and reads_whole(found) == []
    _, found = plans(stack, f"/v1/episodes/{last}")
    assert reads_whole(found) == []
    receipts, found = plans(stack, "/v1/me/receipts", limit=100)
    assert len(receipts["data"]) == 100 and reads_whole(found) == []


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/operate", {}),
        ("/operate/releases", {}),
        ("/operate/rollout", {}),
        ("/operate/audit", {}),
        ("/operate/compare", {"a": "base", "b": "base"}),
        ("/operate/feedback", {}),
        ("/operate/feedback", {"kind": "correction"}),
        ("/operate/feedback", {"user": USER}),
        ("/operate/feedback", {"words": "a word that was said"}),
        ("/operate/feedback", {"status": "set_aside", "reason": "no_consent"}),
    ],
)
def test_every_page_of_operators_is_served_by_indexes(stack, reads_whole, path, query):
    _, found = plans(stack, path, **query)
    assert reads_whole(found) == []


def test_an_answer_in_its_context_is_served_by_indexes(stack, reads_whole):
    episode = stack.http.get("/v1/episodes", headers={"X-Everloop-User": USER}).json()["data"][0]["id"]
    _, found = plans(stack, f"/operate/feedback/{episode}")
    assert reads_whole(found) == []


def test_an_id_alone_finds_its_month(stack, many):
    with stack.sessions() as session:
        newest = session.scalar(sa.select(sa.func.max(Episode.id)))
        plan = session.scalar(sa.text("EXPLAIN (FORMAT JSON) SELECT * FROM episodes WHERE id = '" + newest + "'"))
    read = {node["Relation Name"] for node in nodes(plan) if "Relation Name" in node}
    assert read == {f"episodes_{time_of(newest):%Y_%m}"}


def test_months_are_made_ahead_and_once(stack):
    with stack.sessions() as session:
        assert partitions.ensure(session) == [], "the migration has made the next months"
        at = datetime(2031, 12, 5, tzinfo=UTC)
        assert partitions.ensure(session, at) == [
            f"episodes_{m}" for m in ("2031_12", "2032_01", "2032_02", "2032_03")
        ]
        assert partitions.ensure(session, at) == []
        bounds = session.scalar(
            sa.text("SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'episodes_2031_12'")
        )
        low, high = (first_id("ep", datetime(y, m, 1, tzinfo=UTC)) for y, m in ((2031, 12), (2032, 1)))
        assert low in bounds and high in bounds and low <= new_id("ep", at) < high
        session.rollback()


def test_making_a_month_does_not_wait_long_for_a_reader(stack):
    """Whoever comes after a waiting CREATE waits behind it: so it must give up soon, and leave others alone."""
    at = datetime(2033, 5, 5, tzinfo=UTC)
    with stack.sessions() as reader, stack.sessions() as maker:
        reader.execute(sa.text("LOCK TABLE episodes IN ACCESS SHARE MODE"))
        started_s = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"):
            partitions.ensure_month(maker, at)
        assert time.monotonic() - started_s < partitions.LOCK_TIMEOUT_MS / 1000 + 5
        maker.rollback()
        reader.rollback()
        assert partitions.ensure_month(maker, at) == "episodes_2033_05"
        assert maker.scalar(sa.text("SHOW lock_timeout")) == "0"
        maker.rollback()


@pytest.mark.slow
def test_with_a_million_episodes_every_page_takes_less_than_a_tenth_of_a_second(stack):
    fill(stack, MILLION)
    headers = {"X-Everloop-User": USER}
    page = stack.http.get("/v1/episodes", params={"limit": 100}, headers=headers).json()
    deep = stack.http.get("/v1/episodes", params={"limit": 100}, headers=headers).json()["next_before"]
    for _ in range(50):
        deep = stack.http.get("/v1/episodes", params={"limit": 100, "before": deep}, headers=headers).json()[
            "next_before"
        ]
    paths = {
        "/v1/episodes": {"limit": 100},
        "/v1/episodes?": {"limit": 100, "before": deep},
        f"/v1/episodes/{page['next_before']}": {},
        "/v1/me/receipts": {"limit": 100},
        "/v1/me": {},
        "/metrics": {},
        "/operate": {},
        "/operate/rollout": {},
        "/operate/feedback": {},
        "/operate/feedback?words": {"words": "nobody said this"},
        "/operate/feedback?kind": {"kind": "correction"},
    }
    slowest = {}
    for path, query in paths.items():
        times = []
        for _ in range(20):
            started_s = time.perf_counter()
            assert stack.http.get(path, params=query, headers=headers).status_code == 200
            times.append((time.perf_counter() - started_s) * 1000)
        slowest[path] = sorted(times)[-2]  # of 20: one may meet the machine's noise
    if report := os.environ.get("EVERLOOP_PAGES_REPORT"):
        Path(report).write_text(json.dumps(slowest, indent=2))
    assert max(slowest.values()) < 100, slowest
