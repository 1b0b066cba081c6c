"""An answer that went on is one turn; one that broke off after its calls goes on without making them again."""

import json

import pytest
import sqlalchemy as sa

from agent.memory.prompts import Remembering
from agent.memory.words import stem
from agent.tables import ConversationTerm
from feedback import conversations, episodes
from feedback.tables import Episode
from infra.access.roles import Role
from infra.engine_wire import EngineError
from tests.integration.asking_house import asking_house
from tests.integration.test_access import code
from tests.scripted import Scripted, call

BROKEN = EngineError("The engine is gone.")


@pytest.fixture
def house(database, tmp_path):
    with asking_house(database, tmp_path) as house:
        yield house


@pytest.fixture
def ann(house):
    client, _ = house.program(house.account("Ann", Role.USER))
    headers = {"Authorization": client.headers["Authorization"]}
    return lambda method, path, body=None: house.inside.request(method, path, json=body, headers=headers)


def chat(ann, **body):
    fields = {"model": "everloop", "messages": [{"role": "user", "content": "Well?"}], "server_tools": ["mine"]}
    answer = ann("POST", "/v1/chat/completions", {**fields, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def approve(ann):
    (waits,) = ann("GET", "/v1/tool_calls?status=pending").json()["data"]
    assert ann("POST", f"/v1/tool_calls/{waits['id']}", {"decision": "approve"}).status_code == 200


def go_on(ann, episode_id, **body):
    return ann("POST", f"/v1/chat/completions/{episode_id}/continue", body)


def rows(database):
    with database() as session:
        return session.scalars(sa.select(Episode).order_by(Episode.id)).all()


@pytest.mark.parametrize("stream", [False, True])
def test_after_a_failure_it_goes_on_and_the_call_is_not_made_again(house, ann, database, stream):
    house.app.state.fleet = fleet = Scripted(call("mine", n=7), BROKEN, BROKEN, "It is seven.")
    first = chat(ann)["id"]
    approve(ann)
    assert go_on(ann, first, stream=stream).status_code >= 500 and house.made == [7]
    broken = rows(database)[-1]
    assert broken.status == "failed" and broken.continues == first
    assert go_on(ann, broken.id).status_code >= 500  # by its own name, and by the first one's
    answer = go_on(ann, first)
    assert answer.json()["choices"][0]["message"]["content"] == "It is seven." and house.made == [7]
    assert "the result of 7" in fleet.payloads[-1]["messages"][-1]["content"]
    assert code(go_on(ann, first)) == (409, "already_continued")
    assert code(go_on(ann, broken.id)) == (409, "already_continued")
    last = rows(database)[-1]
    with database() as session:
        assert len(episodes.same_turn(session, first)) == 4 == len(episodes.same_turn(session, last.id))


def test_an_answer_that_broke_off_after_calls_that_needed_no_yes_goes_on_too(house, ann, database):
    house.app.state.fleet = Scripted(call("calculator", expression="6*7"), BROKEN, "42.")
    body = {"model": "everloop", "messages": [{"role": "user", "content": "?"}], "server_tools": ["calculator"]}
    assert ann("POST", "/v1/chat/completions", body).status_code >= 500
    (broken,) = rows(database)
    answer = go_on(ann, broken.id).json()["choices"][0]
    assert answer["message"]["content"] == "42." and answer["steps"][1]["calls"][0]["result"] == "42"


def test_what_is_whole_or_has_no_calls_cannot_be_gone_on_from(house, ann):
    house.app.state.fleet = Scripted("Hello.")
    assert code(go_on(ann, chat(ann)["id"])) == (404, "episode_not_found")


def test_an_answer_that_went_on_is_one_turn_wherever_turns_are_read(house, ann, database):
    house.app.state.fleet = Scripted("I ask. " + call("mine", n=7), "It is seven.", "Good.")
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    first = chat(ann, conversation=talk)["id"]
    approve(ann)
    second = go_on(ann, first).json()["id"]
    chat(ann, conversation=talk, parent=second, messages=[{"role": "user", "content": "Thanks."}])
    turns = ann("GET", f"/v1/conversations/{talk}/turns").json()["data"]
    assert [(turn["question"], turn["answer"]) for turn in turns] == [
        ("Thanks.", "Good."),
        ("Well?", "It is seven."),
    ]
    listed = ann("GET", f"/v1/conversations/{talk}/items?order=asc").json()["data"]
    texts = [item["content"][0]["text"] for item in listed]
    assert texts == ["Well?", "It is seven.", "Thanks.", "Good."]
    with database() as session:
        user = session.get(Episode, second).user_id
        assert [each.id for each in conversations.find_turns(session, user, "well", 9)] == [second]
    assert ann("DELETE", f"/v1/responses/{second}").status_code == 200
    gone = rows(database)[:2]
    assert [(row.messages, row.steps, row.answer) for row in gone] == [([], [], "")] * 2


def test_a_waiting_answer_that_something_else_follows_stays_a_place_to_come_from(house, ann):
    house.app.state.fleet = Scripted("I ask. " + call("mine", n=7), "Never mind.", "It is seven.")
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    first = chat(ann, conversation=talk)["id"]
    aside = chat(ann, conversation=talk, parent=first, server_tools=[])["id"]
    approve(ann)
    second = go_on(ann, first).json()["id"]
    turns = ann("GET", f"/v1/conversations/{talk}/turns").json()["data"]
    assert [turn["id"] for turn in turns] == [second, aside, first]


@pytest.mark.parametrize("keeps", ["store", "learn"])
def test_what_goes_on_is_learned_from_no_more_than_what_it_goes_on_from(house, ann, database, keeps):
    house.app.state.fleet = Scripted(call("mine", n=7), "It is seven.")
    if keeps == "learn":
        assert ann("PUT", "/v1/me/consent", {"learn": False}).status_code == 200
    first = chat(ann, **({"store": False} if keeps == "store" else {"metadata": {"k": "v"}}))["id"]
    if keeps == "learn":
        assert ann("PUT", "/v1/me/consent", {"learn": True}).status_code == 200
    approve(ann)
    go_on(ann, first)
    before, after = rows(database)
    assert (before.learn, after.learn) == (False, False) and before.request == after.request != {}


def test_several_answers_have_their_context_made_once(house, ann, database, monkeypatch):
    made = []
    prompt = Remembering.prompt

    def counted(self, wanted):
        made.append(wanted)
        return prompt(self, wanted)

    monkeypatch.setattr(Remembering, "prompt", counted)
    house.app.state.fleet = Scripted("Well.")
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    chat(ann, conversation=talk, n=3, server_tools=[])
    assert len(made) == 1 and len({json.dumps([row.messages, row.context]) for row in rows(database)}) == 1
    assert len(rows(database)) == 3


def test_a_turn_is_one_persons_whatever_an_episode_names(house, ann, database):
    house.app.state.fleet = Scripted(call("mine", n=7), "Mine.")
    first = chat(ann)["id"]
    bob, _ = house.program(house.account("Bob", Role.USER))
    headers = {"Authorization": bob.headers["Authorization"]}
    body = {"model": "everloop", "messages": [{"role": "user", "content": "I?"}], "server_tools": []}
    other = house.inside.post("/v1/chat/completions", json=body, headers=headers).json()["id"]
    with database.begin() as session:  # as a file could have it
        session.execute(sa.update(Episode).where(Episode.id == other).values(continues=first))
    with database() as session:
        assert episodes.same_turn(session, other) == [other] and episodes.same_turn(session, first) == [first]
        shown = session.scalars(sa.select(Episode.id).where(episodes.is_shown())).all()
        assert {first, other} <= set(shown)
    assert house.inside.delete(f"/v1/responses/{other}", headers=headers).status_code == 200
    assert next(row for row in rows(database) if row.id == first).messages


def test_every_item_that_is_listed_can_be_fetched(house, ann):
    house.app.state.fleet = Scripted("I ask. " + call("mine", n=7), "It is seven.")
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    first = chat(ann, conversation=talk)["id"]
    approve(ann)
    assert go_on(ann, first).status_code == 200
    listed = ann("GET", f"/v1/conversations/{talk}/items?order=asc").json()["data"]
    assert any("_out_" in item["id"] for item in listed)
    for item in listed:
        assert ann("GET", f"/v1/conversations/{talk}/items/{item['id']}").json() == item
        assert code(ann("DELETE", f"/v1/conversations/{talk}/items/{item['id']}")) == (409, "item_of_a_turn")


def test_what_goes_on_makes_one_call_at_a_time_where_that_was_wished(house, ann):
    house.app.state.fleet = Scripted(call("mine", n=7), call("mine", n=8) + call("mine", n=9), "Done.")
    first = chat(ann, parallel_tool_calls=False)["id"]
    approve(ann)
    assert go_on(ann, first).status_code == 200
    waits = ann("GET", "/v1/tool_calls?status=pending").json()["data"]
    assert [each["arguments"] for each in waits] == [{"n": 8}]


def test_an_answer_that_went_on_is_found_by_its_words_until_it_is_deleted(house, ann, database):
    house.app.state.fleet = Scripted("I ask. " + call("mine", n=7), "Seven herons.")
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    first = chat(ann, conversation=talk)["id"]
    approve(ann)
    last = go_on(ann, first).json()["id"]
    with database() as session:
        found = session.scalars(sa.select(ConversationTerm.turns).where(ConversationTerm.term == stem("herons")))
        assert found.all() == [[last]]
    assert ann("DELETE", f"/v1/responses/{last}").status_code == 200
    with database() as session:  # nothing of either answer is left to be found
        assert session.scalars(sa.select(ConversationTerm.term)).all() == []
