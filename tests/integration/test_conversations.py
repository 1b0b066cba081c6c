"""Conversations that are kept: whose they are, what is found in them, what goes when one is deleted."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from agent.app import build_app
from feedback import conversations, episodes, erasure, users
from feedback.conversations import Place
from feedback.episodes import Recording
from feedback.fold import standing_ids
from feedback.tables import Conversation, Episode, Feedback
from infra.ids import new_id
from infra.settings import Settings
from reward.tables import RewardUpdate
from tests.conftest import wait_until
from tests.integration.test_pages import nodes


def record(sessions, user, question, answer, conversation=None, parent=None, **changes):
    """Write a turn as the end of an answer does; return its id."""
    with sessions.begin() as session:
        key = users.meet(session, user)
        fields = {
            "release": "base",
            "adapter_digest": None,
            "canary_id": None,
            "arm": "champion",
            "propensity": 1.0,
        }
        fields |= {"messages": [{"role": "user", "content": question}], "sampling": {}, "learn": True}
        fields |= {
            "answer": answer,
            "status": "complete",
            "finish_reason": "stop",
            "token_ids": [1],
            "logprobs": [-1.0],
        }
        recording = Recording(
            episodes.new_episode_id(), user, conversation_id=conversation, parent_id=parent, **(fields | changes)
        )
        assert episodes.record(session, recording, key)
        return recording.episode_id


class Person:
    """Somebody, and what they ask of the API."""

    def __init__(self, client, name):
        self.client, self.name = client, name

    def __call__(self, method, path="", status=200, **more):
        answer = self.client.request(
            method, f"/v1/conversations{path}", headers={"X-Everloop-User": self.name}, **more
        )
        assert answer.status_code == status, answer.text
        return answer.json()

    def keeps(self, title=None):
        return self("POST", json={"title": title} if title else {}, status=201)["id"]

    def says(self, episode_id, **signal):
        body = {"episode_id": episode_id, "user": self.name, "idempotency_key": uuid.uuid4().hex, **signal}
        answer = self.client.post("/v1/feedback", json=body)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]


@pytest.fixture
def client(database, tmp_path):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    settings = Settings(home=tmp_path, database_url=url, engine_url="http://127.0.0.1:9", access="open")
    with TestClient(build_app(settings), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def ann(client):
    return Person(client, "ann")


@pytest.fixture
def ben(client):
    return Person(client, "ben")


def code_of(answer):
    return answer["error"]["code"]


def test_a_conversation_is_named_by_its_owner_or_by_its_first_question(ann, database):
    one = ann.keeps()
    assert ann("GET", f"/{one}")["title"] is None
    record(database, "ann", "What  is\na canal?\n" + "Tell me all of it. " * 9, "Water.", one)
    record(database, "ann", "And a lock?", "A gate.", one)
    title = ann("GET", f"/{one}")["title"]
    assert title == "What is a canal? Tell me all of it. Tell me all of it. Tell me all of it. Tell…"
    assert len(title) <= conversations.MAX_TITLE_CHARS
    assert ann("POST", f"/{one}", json={"title": " Boats "})["title"] == "Boats"
    assert ann("POST", f"/{one}", json={"title": None})["title"] == title
    assert ann("GET", f"/{ann.keeps('Named at once')}") | {} == ann("GET")["data"][0]


@pytest.mark.parametrize("question", ["", "word", "w" * 80, "w" * 81, "word " * 40, "w" * 79 + " x", "é" * 500])
def test_titles_are_at_most_eighty_characters(question):
    title = conversations.title_of(question)
    assert (title is None) is (question == "")
    assert title is None or (len(title) <= 80 and question.startswith(title.removesuffix("…")))
    assert title is None or title.endswith("…") is (len(question.strip()) > 80)


def test_the_most_recently_used_come_first_and_pages_hold_while_they_move(ann, database):
    ids = [ann.keeps(f"Number {n}") for n in range(5)]
    record(database, "ann", "Why?", "So.", ids[1])
    first = ann("GET", params={"limit": 2})
    assert [each["id"] for each in first["data"]] == [ids[1], ids[4]]
    record(database, "ann", "Why?", "So.", ids[4])  # moves to the top after the page was read
    second = ann("GET", params={"limit": 2, "before": first["next_before"]})
    assert [each["id"] for each in second["data"]] == [ids[3], ids[2]]
    last = ann("GET", params={"limit": 2, "before": second["next_before"]})
    assert [each["id"] for each in last["data"]] == [ids[0]] and last["next_before"] is None
    assert code_of(ann("GET", params={"before": "cv_x"}, status=400)) == "invalid_request"


def test_words_are_found_in_titles_questions_and_answers_of_ones_own(ann, ben, database):
    titled, asked, answered, other = ann.keeps("Garden plans"), ann.keeps(), ann.keeps(), ben.keeps("Garden")
    record(database, "ann", "How deep is a garden pond?", "One metre.", asked)
    record(database, "ann", "What is a weir?", "A low dam; ours has a Garden gate, too.", answered)
    record(database, "ben", "A garden?", "Yes.", other)
    record(database, "ann", "garden, but not kept", "No.")

    def found(query, person=ann):
        return {each["id"] for each in person("GET", params={"query": query})["data"]}

    assert found("garden") == {titled, asked, answered}
    assert found("POND deep") == {asked} and found("garden gate") == {answered}
    assert found("gar") == {titled, asked, answered} and found("garden pon") == {asked}, "while it is typed"
    assert found("pond gate") == set() == found("gar pond gate") == found("arden") == found("?!")
    assert (
        found("'; DROP TABLE x")
        == set()
        == found("a':* | 'b")
        == found("\\")
        == found("ann")
        == found("by")
        == found("_")
    )
    assert found("b") == set()
    assert found("") == found("  ") == {titled, asked, answered}
    assert found("garden", ben) == {other}


def test_somebody_elses_conversation_is_not_there(ann, ben):
    own = ann.keeps("Mine")
    for method, path, more in (
        ("GET", "", {}),
        ("POST", "", {"json": {"title": "Yours"}}),
        ("DELETE", "", {}),
        ("GET", "/turns", {}),
    ):
        for conversation in (own, "cv_nope"):
            answer = ben(method, f"/{conversation}{path}", status=404, **more)
            assert code_of(answer) == "conversation_not_found" and answer["error"]["param"] == "conversation_id"
    assert ann("GET", f"/{own}")["title"] == "Mine" and ben("GET")["data"] == []


def test_what_nobody_in_particular_keeps_is_nobodys(client):
    answer = client.get("/v1/conversations")
    assert (answer.status_code, code_of(answer.json())) == (400, "user_required")


@pytest.mark.parametrize("title", ["", "  ", "x" * 201, "a\x00b", 7])
def test_titles_that_cannot_be_are_refused(ann, title):
    own = ann.keeps("As before")
    for path in ("", f"/{own}"):
        assert code_of(ann("POST", path, json={"title": title}, status=400)) == "invalid_request"
    assert ann("GET", f"/{own}")["title"] == "As before"


def test_turns_come_with_what_their_asker_says_of_them_now(ann, database):
    own = ann.keeps()
    first = record(database, "ann", "One?", "1", own, messages=[
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "One?"}])  # fmt: skip
    again = record(database, "ann", "One?", "I", own, status="interrupted", finish_reason=None)
    then = record(database, "ann", "Two?", "2", own, first)
    ann.says(first, kind="thumb", value=1)
    ann.says(first, kind="thumb", value=-1)
    ann.says(first, kind="reasons", reasons=["too_short"])
    ann.says(first, kind="comment", text="Well.")
    ann.says(first, kind="correction", text="One.")
    ann.says(first, kind="implicit", name="copied")
    ann.says(again, kind="thumb", value=1)
    ann.says(again, kind="thumb", value=0)
    Person(ann.client, "a-judge").says(then, kind="verifier", value=1)
    page = ann("GET", f"/{own}/turns", params={"limit": 2})
    assert [turn["id"] for turn in page["data"]] == [then, again] and page["next_before"] == again
    older = ann("GET", f"/{own}/turns", params={"limit": 2, "before": page["next_before"]})
    assert older["next_before"] is None
    shown = {turn["id"]: turn for turn in page["data"] + older["data"]}
    assert [shown[i]["parent_id"] for i in (first, again, then)] == [None, None, first]
    assert shown[first]["question"] == "One?" and shown[first]["answer"] == "1"
    assert shown[first]["thumb"] == -1 and shown[first]["reasons"] == ["too_short"]
    assert (shown[first]["comment"], shown[first]["correction"]) == ("Well.", "One.")
    assert shown[again]["thumb"] == 0 and shown[again]["status"] == "interrupted"
    assert shown[then]["thumb"] == 0 and shown[then]["release"] == "base"


def test_two_tabs_write_turns_at_once_and_both_are_there(ann, database):
    own = ann.keeps()
    root = record(database, "ann", "One?", "1", own)
    with ThreadPoolExecutor(4) as pool:
        both = set(pool.map(lambda n: record(database, "ann", f"Tab {n}?", "2", own, root), range(8)))
    turns = ann("GET", f"/{own}/turns")["data"]
    assert {turn["id"] for turn in turns if turn["parent_id"] == root} == both and len(both) == 8


def test_a_turn_can_only_stand_in_ones_own_conversation(ann, ben, database):
    own, second, other = ann.keeps(), ann.keeps(), ben.keeps()
    mine = record(database, "ann", "One?", "1", own)
    elsewhere, nowhere = record(database, "ann", "Two?", "2", second), record(database, "ann", "Three?", "3")
    theirs = record(database, "ben", "Four?", "4", other)
    expected = {
        (own, mine): None,
        (own, None): None,
        (other, None): (404, "conversation_not_found", "conversation"),
        ("cv_nope", mine): (404, "conversation_not_found", "conversation"),
        (own, "ep_nope"): (404, "episode_not_found", "parent"),
        (own, theirs): (404, "episode_not_found", "parent"),
        (own, elsewhere): (400, "parent_elsewhere", "parent"),
        (own, nowhere): (400, "parent_elsewhere", "parent"),
    }
    with database() as session:
        found = conversations.refusals(session, {("ann", Place(*place)) for place in expected})
        assert conversations.refusals(session, set()) == {}
    for place, outcome in expected.items():
        error = found.get(("ann", Place(*place)))
        assert (error and (error.status, error.code, error.param)) == outcome
        body = {"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "user": "ann"}
        body |= {"conversation": place[0], **({"parent": place[1]} if place[1] else {})}
        for stream in (False, True):
            answer = ann.client.post("/v1/chat/completions", json={**body, "stream": stream})
            # Of what is not refused the engine is asked, which is away here.
            wanted = (outcome[0], outcome[1]) if outcome else (503, "engine_unavailable")
            assert (answer.status_code, code_of(answer.json())) == wanted, answer.text
    answer = ann.client.post("/v1/chat/completions", json={**body, "conversation": None, "parent": mine})
    assert (answer.status_code, code_of(answer.json())) == (400, "invalid_request")


def test_deleting_withdraws_every_kind_blanks_the_words_and_keeps_the_rest(ann, ben, database):
    own, other = ann.keeps("Secret plans"), ann.keeps()
    first, again = (record(database, "ann", "A secret?", "A secret answer.", own) for _ in range(2))
    apart, unkept = record(database, "ann", "A secret?", "Apart.", other), record(database, "ann", "Two?", "2")
    judge = Person(ann.client, "a-judge")
    ann.says(first, kind="thumb", value=1)
    ann.says(first, kind="rating", value=4)
    ann.says(first, kind="reasons", reasons=["exactly_right"])
    ann.says(first, kind="comment", text="A secret comment.")
    ann.says(first, kind="correction", text="A secret correction.")
    ann.says(first, kind="preference", over=again)
    ann.says(apart, kind="preference", over=first)
    ann.says(first, kind="implicit", name="copied")
    judge.says(first, kind="verifier", value=1, text="A secret check.")
    judge.says(first, kind="judge", score=0.7, text="A secret judgement.")
    ann.says(again, kind="thumb", value=1)
    ann.says(again, kind="thumb", value=0)
    stays = {ann.says(apart, kind="thumb", value=1), ann.says(unkept, kind="thumb", value=-1)}
    gone = ann("DELETE", f"/{own}")
    assert gone == {
        "id": own,
        "object": "conversation.deleted",
        "deleted": True,
        "num_turns": 2,
        "num_signals_withdrawn": 10,
    }
    with database() as session:
        assert set(session.scalars(standing_ids())) == stays
        for episode in session.scalars(sa.select(Episode).where(Episode.id.in_([first, again]))):
            assert (episode.messages, episode.answer, episode.token_ids, episode.logprobs) == ([], "", [], [])
            assert not episode.learn and episode.conversation_id is None and episode.user_id == "ann"
        assert session.get(Episode, apart).answer == "Apart." and session.get(Episode, apart).learn
        assert session.scalars(sa.select(Feedback).where(Feedback.text.is_not(None))).all() == []
        assert session.get(Conversation, own) is None
    assert ann("GET", params={"query": "secret"})["data"][0]["id"] == other and len(ann("GET")["data"]) == 1
    assert code_of(ann("DELETE", f"/{own}", status=404)) == "conversation_not_found"
    assert ann("DELETE", f"/{ann.keeps()}")["num_turns"] == 0


def test_nothing_can_be_said_of_what_was_deleted_however_close_behind(ann, database):
    for _ in range(5):
        own = ann.keeps()
        answers = [record(database, "ann", "A secret?", "Yes.", own) for _ in range(4)]
        bodies = [
            {"episode_id": answer, "user": "ann", "kind": "comment", "text": "A secret.", "idempotency_key": answer}
            for answer in answers
        ]
        with ThreadPoolExecutor(5) as pool:
            saying = [pool.submit(ann.client.post, "/v1/feedback", json=body) for body in bodies]
            pool.submit(ann, "DELETE", f"/{own}").result()
            assert {each.result().status_code for each in saying} <= {202, 404}
        refused = ann.client.post("/v1/feedback", json={**bodies[0], "idempotency_key": "later"})
        assert refused.json()["error"]["code"] == "episode_not_found"
        with database() as session:
            said = session.scalars(sa.select(Feedback).where(Feedback.episode_id.in_(answers))).all()
            assert [row.text for row in said if row.text is not None] == []


def test_a_turn_that_ends_after_its_conversation_was_deleted_leaves_no_word(ann, database):
    own = ann.keeps()
    parent = record(database, "ann", "One?", "1", own)
    ann("DELETE", f"/{own}")
    late = record(database, "ann", "A secret?", "Too late.", own, parent)
    with database() as session:
        episode = session.get(Episode, late)
        assert (episode.messages, episode.answer, episode.learn) == ([], "", False)
        assert episode.conversation_id is episode.parent_id is None and episode.status == "complete"


def test_deleting_and_answering_at_once_neither_fail_nor_lose(ann, database):
    for _ in range(10):
        own = ann.keeps()
        with ThreadPoolExecutor(4) as pool:
            writing = [pool.submit(record, database, "ann", "A secret?", "Yes.", own) for _ in range(6)]
            pool.submit(ann, "DELETE", f"/{own}").result()
            ids = [each.result() for each in writing]
        with database() as session:
            rows = session.scalars(sa.select(Episode).where(Episode.id.in_(ids))).all()
            assert len(rows) == 6 and all(row.answer == "" and not row.learn for row in rows)


def test_being_forgotten_takes_conversations_and_their_titles(ann, ben, database):
    own, other = ann.keeps("Secret plans"), ben.keeps("Mine")
    record(database, "ann", "One?", "1", own)
    with database.begin() as session:
        erasure_id = erasure.forget(session, "ann", "retrain-required")
        assert erasure.get(session, erasure_id)["found"]["feedback"]["conversations"] == 1
    with database() as session:
        assert session.scalars(sa.select(Conversation.id)).all() == [other]
        assert session.scalars(sa.select(Episode.conversation_id)).all() == [None]


MANY = 20_000


def fill(database):
    """Write turns of many people, each in one of their conversations, straight into the tables."""
    with database.begin() as session:
        for number in range(50):
            users.meet(session, f"reader-{number}")
        session.execute(
            sa.text("""
            INSERT INTO conversations (id, user_id)
            SELECT 'cv_' || lpad(to_hex(n), 32, '0'), 'reader-' || n % 50 FROM generate_series(0, 999) AS n
        """)
        )
        session.execute(
            sa.text("""
            INSERT INTO episodes (id, user_id, release, arm, propensity, messages, answer, status, sampling,
                                  token_ids, logprobs, num_prompt_tokens, latency_ms, learn, conversation_id)
            SELECT :low || lpad(to_hex(n), 20, '0'), 'reader-' || n % 50, 'base', 'champion', 1.0,
                   jsonb_build_array(jsonb_build_object('role', 'user', 'content', 'Why ' || n % 97 || '?')),
                   'Because of number' || n, 'complete', '{}', '{}', '{}', 1, 1.0, false,
                   'cv_' || lpad(to_hex(n % 1000), 32, '0')
            FROM generate_series(0, :last) AS n
            """),
            {"low": new_id("ep")[:15], "last": MANY - 1},
        )
        session.execute(
            sa.text("""
            INSERT INTO feedback (id, episode_id, user_id, kind, slot, value, idempotency_key, body_digest)
            SELECT 'fb_' || substr(id, 4), id, user_id, 'thumb', id, 1, id, '' FROM episodes
        """)
        )
    with database.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))


def plans(database, work):
    """Return the nodes of the plans of the statements that `work` makes."""
    statements = []

    def note(connection, cursor, statement, parameters, context, executemany):
        statements.append((statement, parameters))

    engine = database.kw["bind"]
    sa.event.listen(engine, "before_cursor_execute", note)
    with database() as session:
        found = work(session)
    sa.event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        made = [cursor.execute("EXPLAIN (FORMAT JSON) " + s, p).fetchone()[0] for s, p in statements]
    return found, list(nodes(made))


def test_lists_turns_and_searches_are_served_by_indexes(database):
    fill(database)
    cases = {
        "list": lambda s: conversations.page(s, "reader-7", None, 20),
        "rare word": lambda s: conversations.page(s, "reader-7", None, 20, "number107 why"),
        "word of everybody": lambda s: conversations.page(s, "reader-7", None, 20, "because why"),
        "beginning of a word": lambda s: conversations.page(s, "reader-7", None, 20, "because wh"),
        "turns": lambda s: conversations.turns(s, f"cv_{7:032x}", "reader-7", None, 30),
    }
    for name, work in cases.items():
        found, made = plans(database, work)
        assert len(found) == (1 if name == "rare word" else 20), name
        filled = f"episodes_{datetime.now(UTC):%Y_%m}"  # the other months are empty
        whole = [n["Relation Name"] for n in made if n["Node Type"] == "Seq Scan"]
        assert not {filled, "conversations", "feedback"} & set(whole), (name, made)
        if "word" in name:
            assert f"{filled}_expr_idx" in {n.get("Index Name") for n in made}, (name, made)


def test_a_turn_of_the_assistant_is_kept_and_a_deleted_one_is_taken_out_of_the_reward_model(stack):
    user = f"keeper-{uuid.uuid4().hex}"
    person = Person(stack.http, user)
    own = person.keeps()
    first = stack.ask("What is wind?", user=user, extra_body={"conversation": own}).id
    before = person("GET", f"/{own}")["updated_at"]
    chunks = list(stack.ask("Why?", user=user, stream=True, extra_body={"conversation": own, "parent": first}))
    turns = person("GET", f"/{own}/turns")["data"]
    assert [(turn["id"], turn["parent_id"]) for turn in turns] == [(chunks[0].id, first), (first, None)]
    assert turns[1]["question"] == "What is wind?" and turns[1]["answer"] and turns[1]["finish_reason"]
    assert person("GET", f"/{own}")["updated_at"] > before
    signals = {person.says(first, kind="thumb", value=1), person.says(chunks[0].id, kind="implicit", name="copied")}
    judged = {"episode_id": first, "good": False, "reason": "a test"}
    signals.add(stack.http.post("/v1/probes", json=judged).json()["id"])

    def actions():
        with stack.sessions() as session:
            rows = session.execute(
                sa.select(RewardUpdate.feedback_id, RewardUpdate.action)
                .where(RewardUpdate.feedback_id.in_(signals))
                .order_by(RewardUpdate.seq)
            )
            return {feedback_id: action for feedback_id, action in rows}  # noqa: C416

    wait_until(lambda: set(actions()) == signals, what="the signals did not arrive")
    assert person("DELETE", f"/{own}")["num_signals_withdrawn"] == 2
    wait_until(lambda: set(actions().values()) == {"remove"}, what="they are still in the posterior")
    refused = stack.http.post("/v1/probes", json=judged).json()["error"]
    assert refused["code"] == "not_learned_from"
    receipts = stack.http.get("/v1/me/receipts", headers={"X-Everloop-User": user}).json()["data"]
    assert {r["status"] for r in receipts if r["id"] in signals} == {"superseded"}, "by the withdrawal"
