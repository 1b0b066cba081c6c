"""Calls that wait for somebody's yes: theirs alone to give, once, and in time."""

import asyncio

import pytest
import sqlalchemy as sa

from agent.tools.tool import Tool
from agent.turn import Waited
from feedback import conversations, erasure, tool_calls
from feedback.tables import Episode, ToolCall, ToolChoice
from infra.errors import ConflictError, NotFoundError
from tests.scripted import Scripted, call, settings, turn, world

ASK = {"tool_levels": {"mine": "ask"}}
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}


@pytest.fixture
def made():
    """What was really called."""
    return []


@pytest.fixture
def have(database, tmp_path, made):
    """A function that has one turn, which may go on from an episode."""

    async def run(caller, arguments):
        made.append(arguments["n"])
        return f"the result of {arguments['n']}"

    def have(*script, goes_on_from=None, setup=ASK, **body):
        configured, fleet = settings(tmp_path, **setup), Scripted(*script)

        async def inside():
            waited = goes_on_from and waiting(database, goes_on_from)
            async with world(database, configured, [Tool("mine", "Does it.", PARAMETERS, run)]) as (book, toolbox):
                return await turn(book, toolbox, configured, fleet, waited, **{"server_tools": ["mine"], **body})

        one, said, _ = asyncio.run(asyncio.wait_for(inside(), 30))
        one.payloads = fleet.payloads
        return one.recording, said, one

    return have


def waiting(database, episode_id, user="ann"):
    with database() as session:
        episode = session.get(Episode, episode_id)

    async def claim(continued_by):
        with database.begin() as session:
            return tool_calls.claim(session, episode_id, user, continued_by)

    return Waited(episode_id, episode.messages, episode.steps, claim)


def say(database, call_id, user="ann", approve=True):
    with database.begin() as session:
        return tool_calls.decide(session, call_id, user, approve=approve)


def listed(database, user="ann", status=None):
    with database() as session:
        return tool_calls.page(session, user, status, 50)


def test_a_call_waits_and_is_made_after_a_yes_and_no_sooner(database, have, made):
    first, said, one = have("I ask. " + call("mine", n=7))
    assert (first.finish_reason, first.status, made) == ("tool_calls", "complete", [])
    (asked,) = listed(database, status="pending")
    assert (asked.tool, asked.arguments, asked.episode_id) == ("mine", {"n": 7}, first.episode_id)
    assert [waits["id"] for waits in one.tools.handed_over] == [asked.id]
    with pytest.raises(ConflictError) as caught:
        have("Too soon.", goes_on_from=first.episode_id)
    assert caught.value.code == "tool_call_undecided" and made == []
    assert say(database, asked.id).status == "approved" and made == []
    second, said, one = have("It is the result.", goes_on_from=first.episode_id)
    assert made == [7] and said == second.answer == "It is the result."
    assert second.messages == first.messages
    assert "the result of 7" in one.payloads[0]["messages"][-1]["content"]
    continues, step, stop = second.steps
    assert continues == {"continues": first.episode_id} and stop == {"stop": "answered"}
    assert step["calls"][0]["status"] == "ok" and "expires_at" not in step["calls"][0]
    assert listed(database, status="pending") == []
    assert one.num_tokens == (20, len(second.token_ids))  # the first answer's were counted with it


def test_a_no_is_told_to_the_model(database, have, made):
    first, *_ = have(call("mine", n=1) + call("mine", n=2))
    one, two = (step["id"] for step in first.steps[0]["calls"])
    say(database, one, approve=False)
    say(database, two)
    second, _, turn = have("Half of it.", goes_on_from=first.episode_id)
    assert made == [2]
    assert [each["status"] for each in second.steps[1]["calls"]] == ["denied", "ok"]
    assert "did not allow" in turn.payloads[0]["messages"][-1]["content"]


def test_saying_it_twice_is_harmless_and_saying_the_other_is_refused(database, have, made):
    first, *_ = have(call("mine", n=1))
    (asked,) = listed(database)
    assert say(database, asked.id) == say(database, asked.id)
    with pytest.raises(ConflictError) as caught:
        say(database, asked.id, approve=False)
    assert caught.value.code == "tool_call_decided"
    have("Well.", goes_on_from=first.episode_id)
    with pytest.raises(ConflictError) as caught:
        have("Again.", goes_on_from=first.episode_id)
    assert caught.value.code == "already_continued" and made == [1]


def test_two_who_go_on_at_once_make_the_call_once(database, tmp_path, have, made):
    first, *_ = have(call("mine", n=1))
    say(database, first.steps[0]["calls"][0]["id"])
    configured = settings(tmp_path, **ASK)

    async def run(caller, arguments):
        made.append(1)
        await asyncio.sleep(0.1)
        return "once"

    async def inside():
        async with world(database, configured, [Tool("mine", "Does it.", PARAMETERS, run)]) as (book, toolbox):
            waited = [waiting(database, first.episode_id) for _ in range(8)]
            turns = [
                turn(book, toolbox, configured, Scripted("Well."), each, server_tools=["mine"]) for each in waited
            ]
            return await asyncio.gather(*turns, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(inside(), 30))
    refused = [each for each in found if isinstance(each, ConflictError)]
    assert len(refused) == 7 and made == [1]


def test_somebody_elses_call_is_not_there(database, have):
    have("Hello.", user="ben", server_tools=[])
    first, *_ = have(call("mine", n=1))
    (asked,) = listed(database)
    assert listed(database, "ben") == []
    with pytest.raises(NotFoundError):
        say(database, asked.id, "ben")
    with database.begin() as session, pytest.raises(NotFoundError):
        tool_calls.claim(session, first.episode_id, "ben", "ep_x")


def test_a_call_that_waits_too_long_is_given_up(database, have, made):
    first, *_ = have(call("mine", n=1), setup={**ASK, "approval_minutes": 0.0001})
    asyncio.run(asyncio.sleep(0.05))
    (asked,) = listed(database)
    assert asked.status == "expired" and listed(database, status="pending") == []
    assert listed(database, status="expired") == [asked]
    with pytest.raises(ConflictError) as caught:
        say(database, asked.id)
    assert caught.value.code == "tool_call_expired"
    with pytest.raises(ConflictError):
        have("Well.", goes_on_from=first.episode_id)
    assert made == []


def test_a_tool_that_was_turned_off_meanwhile_is_not_called(database, have, made):
    first, *_ = have(call("mine", n=1))
    say(database, first.steps[0]["calls"][0]["id"])
    second, *_ = have("Well.", goes_on_from=first.episode_id, setup={"tool_levels": {"mine": "off"}})
    assert made == [] and second.steps[1]["calls"][0]["status"] == "off"


def test_a_yes_to_one_call_is_none_to_the_next(database, have, made):
    first, *_ = have(call("mine", n=1))
    say(database, first.steps[0]["calls"][0]["id"])
    second, *_ = have(call("mine", n=2), goes_on_from=first.episode_id)
    assert made == [1] and second.finish_reason == "tool_calls"
    (asked,) = listed(database, status="pending")
    assert asked.arguments == {"n": 2} and asked.episode_id == second.episode_id


def test_what_tools_did_is_told_though_the_engine_fails_then(database, have, made):
    first, *_ = have(call("mine", n=1))
    say(database, first.steps[0]["calls"][0]["id"])
    with pytest.raises(ConflictError):  # stands for any error of the engine's
        have(ConflictError("It fails."), goes_on_from=first.episode_id)
    with database() as session:
        last = session.scalars(sa.select(Episode).order_by(Episode.id.desc())).first()
    assert made == [1] and last.status == "failed"
    assert last.steps[1]["calls"][0]["result"] == "the result of 1" and last.steps[-1] == {"stop": "failed"}


def test_who_is_forgotten_takes_levels_calls_and_results_along(database, have):
    have(call("mine", n=4711))
    with database.begin() as session:
        tool_calls.choose(session, "ann", "mine", "ask")
        erasure.forget(session, "ann", "retrain-required")
    with database() as session:
        assert session.scalars(sa.select(ToolCall)).all() == session.scalars(sa.select(ToolChoice)).all() == []
        assert session.scalars(sa.select(Episode.steps)).all() == [[]]


def test_a_deleted_conversation_takes_its_calls_along(database, have):
    have("Hello.", server_tools=[])
    with database.begin() as session:
        talk = conversations.create(session, "ann", None).id
    have(call("mine", n=4711), conversation=talk)
    (asked,) = listed(database)
    with database.begin() as session:
        conversations.delete(session, talk, "ann")
    assert listed(database) == []
    with pytest.raises(NotFoundError):
        say(database, asked.id)
