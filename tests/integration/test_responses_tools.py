"""Tools in responses, as the official client sends and reads them."""

import json

import openai
import pytest
import sqlalchemy as sa
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseItemList,
    ResponseOutputMessage,
    ResponseStreamEvent,
)
from openai.types.responses.response_output_item import McpApprovalRequest, McpCall
from pydantic import TypeAdapter

from feedback.tables import Episode
from infra.access.roles import Role
from infra.engine_wire import EngineError
from tests.integration.asking_house import PARAMETERS, asking_house
from tests.scripted import Scripted, call

WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def house(database, tmp_path):
    with asking_house(database, tmp_path) as house:
        yield house


@pytest.fixture
def client(house):
    person, _ = house.program(house.account("Ann", Role.USER))
    key = person.headers["Authorization"][7:]
    return openai.OpenAI(base_url="http://testserver/v1", api_key=key, http_client=house.inside, max_retries=0)


@pytest.fixture
def ask(client):
    """A function that asks, whole or streamed; what is streamed is checked against what is kept."""

    def ask(stream=False, **body):
        body = {"model": "everloop", "input": "Well?", **body}
        if not stream:
            made = client.responses.create(**body)
        else:
            with client.responses.stream(**body) as events:
                seen = list(events)
                made = events.get_final_response()
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
            raw = client.responses.with_raw_response.retrieve(made.id).http_response.json()
            done = [event.item.model_dump() for event in seen if event.type == "response.output_item.done"]
            kept = Response.model_validate(raw).output
            assert [item["id"] for item in done] == [item.id for item in kept] == [item.id for item in made.output]
            ask.kinds = [event.type for event in seen]
            ask.seen = seen
        Response.model_validate(
            made.model_dump(exclude={"text": {"format"}, "output": {"__all__": {"parsed_arguments"}}})
        )
        kept = client.responses.retrieve(made.id)
        assert [item.id for item in kept.output] == [item.id for item in made.output]
        assert kept.usage == made.usage and kept.status == made.status
        return made

    return ask


def prompt(house):
    return [(message["role"], message["content"]) for message in house.app.state.fleet.payloads[-1]["messages"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_of_the_clients_is_called_and_answered(house, client, ask, stream):
    house.app.state.fleet = Scripted("I look. " + call("weather", n=1) + call("weather", n=2), "Sunny.")
    first = ask(stream, tools=[WEATHER])
    said, one, two = first.output
    assert isinstance(said, ResponseOutputMessage) and isinstance(one, ResponseFunctionToolCall)
    assert (first.output_text, first.status, one.arguments, two.arguments) == (
        "I look. ",
        "completed",
        '{"n": 1}',
        '{"n": 2}',
    )
    assert first.tools[0].name == "weather" and client.responses.retrieve(first.id).tools == first.tools
    outputs = [
        {"type": "function_call_output", "call_id": each.call_id, "output": f"sunny {each.arguments}"}
        for each in (one, two)
    ]
    second = ask(stream, previous_response_id=first.id, input=outputs, tools=[WEATHER])
    assert second.output_text == "Sunny."
    shown = prompt(house)
    assert shown[1] == ("user", "Well?") and "weather" in shown[2][1] and "I look." in shown[2][1]
    assert "sunny" in shown[3][1] and "<tool_result>" in shown[3][1] and len(shown) == 4
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [(item.type, item.call_id) for item in listed] == [
        ("function_call_output", each.call_id) for each in (one, two)
    ]
    raw = client.responses.input_items.with_raw_response.list(second.id).http_response.json()
    ResponseItemList.model_validate(raw)
    house.app.state.fleet = Scripted("Yes.")
    ask(previous_response_id=second.id, input="Really?")
    assert [role for role, _ in prompt(house)] == ["user", "assistant", "user", "assistant", "user"]


def test_a_stream_has_the_events_of_a_call(house, ask):
    house.app.state.fleet = Scripted(call("weather", n=1))
    ask(True, tools=[WEATHER])
    assert ask.kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    for event in ask.seen:
        EVENT.validate_python(event.model_dump(exclude={"response": {"text"}}))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_the_servers_is_called_by_the_server(house, client, ask, stream):
    house.app.state.fleet = Scripted("I count. " + call("calculator", expression="6*7"), "It is 42.")
    made = ask(stream, extra_body={"server_tools": ["calculator"]})
    said, called, answer = made.output
    assert isinstance(called, McpCall) and (called.name, called.server_label) == ("calculator", "everloop")
    assert (called.output, called.status, called.error) == ("42", "completed", None)
    assert [said.content[0].text, answer.content[0].text] == ["I count. ", "It is 42."]
    assert made.usage.input_tokens == 40
    if stream:
        assert "response.mcp_call.completed" in ask.kinds
    # What was returned may be sent back, as clients do who keep their own past.
    house.app.state.fleet = Scripted("Again.")
    past = [{"role": "user", "content": "Well?"}, *[item.model_dump(exclude_none=True) for item in made.output]]
    client.responses.create(model="everloop", input=[*past, {"role": "user", "content": "Sure?"}])
    shown = prompt(house)
    assert [role for role, _ in shown] == ["user", "assistant", "user", "assistant", "user"] and "42" in shown[2][1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_asks_goes_on_after_a_yes(house, client, ask, stream, database):
    house.app.state.fleet = Scripted("I ask. " + call("mine", n=7), EngineError("It is gone."), "It is seven.")
    first = ask(stream, extra_body={"server_tools": ["mine"]}, temperature=0.25, instructions="Be brief.")
    waits = first.output[-1]
    assert isinstance(waits, McpApprovalRequest) and json.loads(waits.arguments) == {"n": 7} and not house.made
    assert first.status == "completed" and first.instructions == "Be brief."
    yes = {"type": "mcp_approval_response", "approval_request_id": waits.id, "approve": True}
    with pytest.raises(openai.APIStatusError):
        client.responses.create(model="everloop", previous_response_id=first.id, input=[yes])
    second = ask(stream, previous_response_id=first.id, input=[yes])
    called, answer = second.output
    assert (called.output, called.approval_request_id, house.made) == ("the result of 7", waits.id, [7])
    assert answer.content[0].text == "It is seven." and second.temperature == 0.25
    with database() as session:
        kept = session.scalars(sa.select(Episode).order_by(Episode.id)).all()
    assert [row.continues for row in kept] == [None, kept[0].id, kept[1].id]
    with pytest.raises(openai.ConflictError, match="went on already"):
        client.responses.create(model="everloop", previous_response_id=first.id, input=[yes])
    house.app.state.fleet = Scripted("Fine.")
    client.responses.create(model="everloop", previous_response_id=second.id, input="Thanks.")
    assert prompt(house) == [("user", "Well?"), ("assistant", "It is seven."), ("user", "Thanks.")]


def test_a_refused_request_decides_nothing(house, client, ask):
    house.app.state.fleet = Scripted(call("mine", n=7), "As you wish.")
    first = ask(extra_body={"server_tools": ["mine"]})
    yes = {"type": "mcp_approval_response", "approval_request_id": first.output[0].id, "approve": True}
    with pytest.raises(openai.BadRequestError, match="goes on"):
        client.responses.create(model="r9-of-others", previous_response_id=first.id, input=[yes])
    ask(previous_response_id=first.id, input=[{**yes, "approve": False}])
    assert house.made == []


def test_a_no_is_told_to_the_model(house, client, ask):
    house.app.state.fleet = Scripted(call("mine", n=7), "As you wish.")
    first = ask(extra_body={"server_tools": ["mine"]})
    no = {"type": "mcp_approval_response", "approval_request_id": first.output[0].id, "approve": False}
    second = ask(previous_response_id=first.id, input=[no])
    assert second.output[0].status == "failed" and "did not allow" in second.output[0].error.content
    assert second.output_text == "As you wish." and house.made == []


def test_a_tool_can_be_demanded(house, ask):
    house.app.state.fleet = Scripted('{"n": 3}')
    made = ask(tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False)
    assert made.output[0].arguments == '{"n": 3}' and made.parallel_tool_calls is False
    assert "structured_outputs" in house.app.state.fleet.payloads[0]
    assert made.tool_choice.name == "weather"


def test_what_is_too_long_is_cut_where_that_is_wanted(house, client, ask):
    house.app.state.fleet = Scripted("Long.")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(input="Begin. " + "reeds " * 9000 + "End?")
    assert caught.value.code == "context_length_exceeded"
    made = ask(input="Begin. " + "reeds " * 9000 + "End?", truncation="auto")
    (question,) = [text for role, text in prompt(house) if role == "user"]
    assert question.startswith("Begin.") and question.endswith("End?") and len(question) < 20000
    assert made.truncation == "auto"
    (item,) = client.responses.input_items.list(made.id).data
    assert len(item.content[0].text) > 50000  # as it was said


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
YES = {"type": "mcp_approval_response", "approval_request_id": "call_none", "approve": True}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": [OUTPUT]}, "tool_call_not_found", "input"),
        ({"input": [CALL, {"role": "user", "content": "x"}]}, "tool_output_missing", "input"),
        ({"input": [{**OUTPUT, "output": [{"type": "input_image"}]}]}, "unsupported_parameter", "input.0.output"),
        ({"input": [{**CALL, "namespace": "x"}]}, "unsupported_parameter", "input.0.namespace"),
        ({"input": [{"type": "mcp_list_tools"}]}, "unsupported_parameter", "input.0.type"),
        ({"input": [YES]}, "tool_call_not_found", "previous_response_id"),
        ({"input": [YES, OUTPUT]}, "approvals_alone", "input"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "unsupported_parameter", "tools.0.type"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "unsupported_parameter", "tools.0.defer_loading"),
        ({"tools": [{**WEATHER, "parameters": {"type": "tekst"}}]}, "invalid_request", "tools"),
        ({"tool_choice": "perhaps"}, "invalid_request", "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "unsupported_parameter", "tool_choice"),
        ({"tool_choice": "required"}, "unknown_tool", "tool_choice"),
        ({"server_tools": ["none"]}, "unknown_tool", "server_tools"),
        ({"max_tool_calls": 3}, "unsupported_parameter", "max_tool_calls"),
        (
            {"input": [YES], "previous_response_id": "ep_x", "temperature": 0.1},
            "unsupported_parameter",
            "temperature",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(house, client, body, code, param):
    house.app.state.fleet = Scripted("No.")
    answer = house.inside.post(
        "/v1/responses",
        json={"model": "everloop", "input": "x", **body},
        headers={"Authorization": f"Bearer {client.api_key}"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code) or answer.status_code == 404
    assert error["code"] == code and str(error["param"]).startswith(param)
