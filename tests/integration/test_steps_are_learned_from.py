"""What tools returned goes where the answer goes: to the reward model, to training, into exports and the log."""

import json

import pytest
import sqlalchemy as sa

from feedback import episodes
from feedback.episodes import Recording
from feedback.exporting import Selection, export_file
from feedback.importing import import_file
from feedback.tables import Episode, ToolCall
from infra.events import EpisodeRecorded
from infra.settings import Settings
from infra.tables import OutboxRow
from reward import store
from reward.observations import reason_against

STEP = {
    "step": 1, "text": "I count.", "offered": ["calculator"], "tokens": 9, "prompt_tokens": 30,
    "calls": [{
        "id": "call_1", "tool": "calculator", "source": "built in", "arguments": {"expression": "6*7"},
        "level": "auto", "status": "ok", "result": "42", "error": None, "started_at": None, "ms": 1.0,
    }],
}  # fmt: skip
STEPS = [STEP, {"stop": "answered"}]


@pytest.fixture
def recorded(database):
    """An episode with a step."""

    def record(steps, **more):
        with database.begin() as session:
            key, _ = episodes.begin(session, "ann", True)
            fields = {
                "user_id": "ann",
                "release": "base",
                "adapter_digest": None,
                "canary_id": None,
                "arm": "champion",
            }
            fields |= {"propensity": 1.0, "messages": [{"role": "user", "content": "How many?"}], "sampling": {}}
            fields |= {"learn": True, "answer": "It is 42.", "status": "complete", "finish_reason": "stop"}
            recording = Recording(episodes.new_episode_id(), **(fields | more), steps=steps)
            episodes.record(session, recording, key)
        with database() as session:
            return session.get(Episode, recording.episode_id)

    return record


def test_an_answer_is_judged_and_trained_with_what_it_was_based_on(recorded):
    plain, stepped = recorded([]), recorded(STEPS)
    assert plain.seen == plain.messages
    asked, called, result = stepped.seen
    assert asked == {"role": "user", "content": "How many?"}
    assert called["content"].startswith("I count.\n<tool_call>") and "\n42\n" in result["content"]
    assert store.digest_of(plain, plain.answer) != store.digest_of(stepped, stepped.answer)
    assert store.digest_of(plain, plain.answer) == store.answer_digest(plain.messages, plain.answer)


def test_nothing_is_learned_from_an_answer_that_waits(recorded):
    assert reason_against(recorded(STEPS)) is None
    assert reason_against(recorded(STEPS, finish_reason="tool_calls")) == "answer_waits"


def test_the_event_has_the_steps_sealed(recorded, database):
    episode = recorded(STEPS)
    with database() as session:
        value = json.loads(session.scalars(sa.select(OutboxRow.value)).one())
        key = episodes.users.key_of(session, "ann")
    assert "steps" not in value["data"] and "6*7" not in json.dumps(value)
    assert EpisodeRecorded.from_cloudevent(value, key.key).steps == episode.steps == STEPS


def test_an_export_has_the_steps_and_can_be_imported(recorded, database, tmp_path):
    recorded(STEPS)
    recorded(STEPS, finish_reason="tool_calls")
    path = tmp_path / "answers.jsonl"
    assert export_file(database, path, "jsonl", Selection()).rows == 1
    line = json.loads(path.read_text())
    assert line["steps"] == STEPS
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({**line, "id": "elsewhere"}))
    import_file(database, copy, Settings(home=tmp_path))
    with database() as session:
        assert session.scalars(sa.select(Episode.steps).where(Episode.arm == "imported")).one() == STEPS
    pending = {**STEP, "calls": [{**STEP["calls"][0], "status": "pending", "expires_at": "2026-01-01T00:00:00Z"}]}
    copy.write_text(json.dumps({**line, "id": "another", "steps": [pending]}))
    assert import_file(database, copy, Settings(home=tmp_path)).rejected == 1
    with database() as session:
        assert session.scalars(sa.select(ToolCall)).all() == []


def test_what_an_imported_answer_went_on_from_is_left_behind(recorded, database, tmp_path):
    file, copy = tmp_path / "all.jsonl", tmp_path / "copy.jsonl"
    before = recorded(STEPS)
    episode = recorded([{"continues": before.id}, *STEPS])
    export_file(database, file, "jsonl", Selection())
    line = next(row for row in map(json.loads, file.read_text().splitlines()) if row.get("id") == episode.id)
    copy.write_text(json.dumps({**line, "id": "another"}))
    assert import_file(database, copy, Settings(home=tmp_path)).rejected == 0
    with database() as session:
        [imported] = session.scalars(sa.select(Episode).where(Episode.arm == "imported"))
        assert imported.continues is None and imported.steps == STEPS
