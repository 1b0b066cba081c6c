"""What the first version wrote is still there, and usable, after the upgrade."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import infra
from deploy.tables import Adapter
from feedback import users
from feedback.acceptance import accept
from feedback.signals import read_signal
from feedback.tables import Episode, Feedback
from infra.db import connect
from infra.log import reading
from infra.tables import OutboxRow


def upgrade(url, revision):
    config = Config()
    config.set_main_option("script_location", str(Path(infra.__file__).parent / "migrations"))
    config.attributes["database_url"] = url
    command.upgrade(config, revision)


FIRST = """
    INSERT INTO episodes (id, user_id, release, arm, propensity, messages, answer, status, sampling, token_ids,
                          logprobs, num_prompt_tokens, latency_ms, learn)
    SELECT 'ep_' || md5(n::text), 'user-' || n % 3, 'base', 'champion', 1.0,
           '[{"role": "user", "content": "Why?"}]', 'Because.', 'complete', '{}', '{1,2}', '{-0.5,-0.1}', 3, 12.5,
           true FROM generate_series(1, 30) AS n;
    INSERT INTO feedback (id, episode_id, user_id, kind, value, text, idempotency_key, body_digest)
    SELECT 'fb_' || md5(n::text), 'ep_' || md5(n::text), 'user-' || n % 3, 'thumb', 1, NULL, 'k' || n, ''
    FROM generate_series(1, 30) AS n;
    INSERT INTO outbox (event_id, topic, key, event)
    SELECT 'ev_' || n, 'everloop.feedback', 'ep_' || md5(n::text), jsonb_build_object(
        'specversion', '1.0', 'id', 'ev_' || n, 'dataschema', 'urn:everloop:schema:feedback.given.v1',
        'data', jsonb_build_object('feedback_id', 'fb_' || md5(n::text), 'episode_id', 'ep_' || md5(n::text),
                                   'user_id', 'user-' || n % 3, 'kind', 'thumb', 'value', 1))
    FROM generate_series(1, 30) AS n;
    INSERT INTO consumed_events (consumer, event_id) SELECT 'reward', 'ev_' || n FROM generate_series(1, 28) AS n;
    INSERT INTO adapters (digest, path, base_digest, manifest, created_at)
    VALUES (repeat('a', 64), '/somewhere', repeat('b', 64), '{}', '2026-01-01');
"""


def test_the_first_versions_data_survives_the_upgrade(empty_database):
    url = empty_database
    upgrade(url, "0001")
    sessions = connect(url, pool_size=1)
    with sessions.begin() as session:
        session.execute(sa.text(FIRST))
    upgrade(url, "head")
    with sessions.begin() as session:
        assert session.query(Episode).count() == session.query(Feedback).count() == 30
        one = session.scalars(sa.select(Episode).limit(1)).one()
        assert one.token_ids == [1, 2] and one.logprobs == [-0.5, -0.1] and one.messages[0]["content"] == "Why?"
        assert len(users.keys_of(session, ["user-0", "user-1", "user-2"])) == 3
        assert len({key.key for key in users.keys_of(session, ["user-0", "user-1", "user-2"]).values()}) == 3
        # What nobody had applied is still to come, and can be read.
        waiting = session.scalars(sa.select(OutboxRow.value)).all()
        envelopes = [reading.parse(value) for value in waiting]
        assert all(b"user-" not in value for value in waiting), "what a person is called is sealed"
        opened = [event for _, event in reading.open_all(session, envelopes, [e.event_class for e in envelopes])]
        assert [event.kind for event in opened] == ["thumb", "thumb"]
        assert all(event.slot == event.episode_id for event in opened)
        signal = {"episode_id": one.id, "user": one.user_id, "kind": "rating", "value": 5, "idempotency_key": "new"}
        assert accept(session, read_signal.validate_python(signal)).kind == "rating"
        adapter = session.get_one(Adapter, "a" * 64)
        assert adapter.stored_at == adapter.created_at and adapter.files_deleted_at is None, "it is as old as it is"
    sessions.kw["bind"].dispose()
