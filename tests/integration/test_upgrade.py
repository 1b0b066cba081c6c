"""While an upgrade goes on, the previous version runs on the new schema: what it writes and reads still works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from feedback.tables import Episode, Feedback
from infra.log import reading
from infra.settings import Settings
from infra.stack.embedded import alembic_config
from infra.tables import OutboxRow

ROOT = Path(__file__).parents[2]
PAGES = (
    *("/operate", "/operate/releases", "/operate/rollout", "/operate/learning", "/operate/feedback"),
    *("/operate/audit", "/v1/deployment", "/v1/runs?limit=5", "/v1/me", "/taught", "/metrics"),
)
# Run by the previous version's code; it uses what every version has.
OLD = """
import json, sys, uuid
from fastapi.testclient import TestClient
from agent.app import build_app
from flows.bench.stack import write_episode
from infra.db import connect
from infra.settings import load
import agent

settings = load()
sessions = connect(settings.need("database_url"), pool_size=2)
with sessions.begin() as session:
    episode = write_episode(session, "old-user", 1, "It is one.")
    write_episode(session, "other-user", 1, "It is one.")
    other = write_episode(session, "old-user", 1, "Number one.")
said = [
    {"kind": "thumb", "value": 1}, {"kind": "rating", "value": 4}, {"kind": "comment", "text": "Good."},
    {"kind": "correction", "text": "It is one, indeed."}, {"kind": "preference", "over": other},
]
found = {"code": agent.__file__, "episodes": [episode, other], "pages": {}, "signals": []}
with TestClient(build_app(settings), base_url="http://localhost") as client:
    for signal in said:
        body = {"episode_id": episode, "user": "old-user", "idempotency_key": uuid.uuid4().hex, **signal}
        reply = client.post("/v1/feedback", json=body)
        found["signals"].append([reply.status_code, reply.json().get("id")])
    for page in json.loads(sys.argv[1]):
        found["pages"][page] = client.get(page, headers={"X-Everloop-User": "old-user"}).status_code
    found["consent"] = client.put(
        "/v1/me/consent", json={"learn": False}, headers={"X-Everloop-User": "old-user"}
    ).status_code
    found["forgotten"] = client.delete("/v1/me", headers={"X-Everloop-User": "other-user"}).status_code
print(json.dumps(found))
"""


def git(*command):
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def previous(tmp_path_factory):
    """The code as it was before the newest migration, and that version's schema."""
    scripts = ScriptDirectory.from_config(alembic_config(Settings(home="/nowhere", database_url="unused")))
    newest = scripts.get_revision("head")
    path = Path(newest.path).relative_to(ROOT)
    added = git("log", "--first-parent", "-m", "--diff-filter=A", "--format=%H", "-1", "--", str(path))
    if added.returncode != 0 or git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip(
            "The history of the repository is not here: the previous version's code cannot be taken from it."
        )
    before = f"{added.stdout.strip()}^" if added.stdout.strip() else "HEAD"  # not committed yet
    code = tmp_path_factory.mktemp("previous")
    archive = subprocess.run(["git", "archive", before], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
    assert not (code / path).exists()
    return code, newest.down_revision


def test_the_previous_version_works_on_the_new_schema(previous, database, tmp_path):
    code, _ = previous
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    given = {
        **os.environ,
        "PYTHONPATH": str(code),
        "EVERLOOP_HOME": str(tmp_path),
        "EVERLOOP_DATABASE_URL": url,
        "EVERLOOP_ACCESS": "open",  # who may come in is not the question either
        "EVERLOOP_ENGINE_URL": "http://127.0.0.1:9",  # nobody answers: what it serves is not the question
    }
    done = subprocess.run(
        [sys.executable, "-c", OLD, json.dumps(PAGES)],
        capture_output=True, text=True, env=given, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"].startswith(str(code)), "another version ran"
    assert found["pages"] == dict.fromkeys(PAGES, 200)
    assert [status for status, _ in found["signals"]] == [202] * 5 and found["consent"] == 200
    assert found["forgotten"] in (200, 202)
    with database() as session:  # and this version reads what that one wrote
        assert set(found["episodes"]) <= set(session.scalars(sa.select(Episode.id)))
        signals = [feedback_id for _, feedback_id in found["signals"]]
        assert set(session.scalars(sa.select(Feedback.id).where(Feedback.id.in_(signals)))) == set(signals)
        envelopes = [reading.parse(value) for value in session.scalars(sa.select(OutboxRow.value))]
        opened = list(reading.open_all(session, envelopes, {e.event_class for e in envelopes}))
    assert {envelope.event_id for envelope, _ in opened} >= {*signals}


def test_the_newest_migration_only_expands(previous):
    """What the version before still uses must not go, or change its name, in the same release."""
    _, before = previous
    config = alembic_config(Settings(home="/nowhere", database_url="postgresql+psycopg://nobody@nowhere/none"))
    scripts = ScriptDirectory.from_config(config)
    for revision in scripts.iterate_revisions("head", before):
        source = Path(revision.path).read_text().partition("def downgrade")[0]
        for contracting in (
            "drop_table",
            "drop_column",
            "rename_table",
            "new_column_name",
            "DROP COLUMN",
            "RENAME ",
        ):
            assert contracting not in source, f"{revision.path}: {contracting}"
