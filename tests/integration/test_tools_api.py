"""Tools through the API: the wire, levels, and a yes that is somebody's own to give."""

import json

import openai
import pytest
from fastapi.testclient import TestClient

from agent.tools.tool import Tool
from infra.access.roles import Role
from tests.integration.test_access import House, code
from tests.scripted import Scripted, call

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
XSS = '<img src=x onerror="window.pwned=1">'


@pytest.fixture
def house(database, tmp_path):
    levels = {"mine": "ask", "date_time": "off"}
    house = House(database, tmp_path, tool_levels=levels, self_evaluation=False)
    made = house.made = []

    async def run(caller, arguments):
        made.append((caller.user, arguments["n"]))
        return f"{XSS} {arguments['n']}"

    with TestClient(house.app) as house.inside:
        house.app.state.toolbox.own["mine"] = Tool("mine", "Does it.", PARAMETERS, run)
        yield house


@pytest.fixture
def people(house):
    """Two people, each a function that calls the API."""

    def person(name):
        client, _ = house.program(house.account(name, Role.USER))
        headers = {"Authorization": client.headers["Authorization"]}

        def ask(method, path, body=None):
            return house.inside.request(method, path, json=body, headers=headers)

        ask.headers = headers
        return ask

    return person("Ann"), person("Ben")


def chat(person, **body):
    fields = {"model": "everloop", "messages": [{"role": "user", "content": "Well?"}]}
    return person("POST", "/v1/chat/completions", {**fields, **body})


def chunks(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_whole_answer_names_the_call_that_waits_and_goes_on_after_a_yes(house, people):
    ann, ben = people
    house.app.state.fleet = Scripted(call("mine", n=7), "It is seven.")
    body = chat(ann, server_tools=["mine"]).json()
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (waits,) = choice["message"]["tool_calls"]
    assert waits["function"] == {"name": "mine", "arguments": '{"n": 7}'}
    assert waits["everloop"] == {"source": "built in", "status": "pending"}

    (listed,) = ann("GET", "/v1/tool_calls?status=pending").json()["data"]
    assert (listed["id"], listed["episode_id"], listed["arguments"]) == (waits["id"], body["id"], {"n": 7})
    assert ben("GET", "/v1/tool_calls").json() == {"data": []}
    path, going_on = f"/v1/tool_calls/{waits['id']}", f"/v1/chat/completions/{body['id']}/continue"
    assert code(ben("POST", path, {"decision": "approve"})) == (404, "tool_call_not_found")
    assert code(ben("POST", going_on, {})) == (404, "episode_not_found")
    assert code(ann("POST", going_on, {})) == (409, "tool_call_undecided")
    assert ann("POST", path, {"decision": "approve"}).json()["status"] == "approved"
    assert ann("POST", path, {"decision": "approve"}).status_code == 200
    assert code(ann("POST", path, {"decision": "deny"})) == (409, "tool_call_decided")
    assert house.made == []

    rest = chunks(ann("POST", going_on, {"stream": True, "stream_options": {"include_steps": True}}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in rest if c["choices"]) == "It is seven."
    assert len(house.made) == 1 and house.made[0][1] == 7
    assert code(ann("POST", going_on, {})) == (409, "already_continued")
    assert rest[0]["id"] != body["id"]
    told = ann("GET", "/v1/tool_calls?status=approved").json()["data"]
    assert told[0]["continued_by"] == rest[0]["id"]


def test_steps_are_streamed_to_whoever_asks_for_them_and_to_nobody_else(house, people):
    ann, _ = people
    script = ["I count. " + call("calculator", expression="6*7"), "42"]
    house.app.state.fleet = Scripted(*script)
    asked = {"stream": True, "server_tools": ["calculator"]}
    options = {"include_usage": True, "include_steps": True}
    found = chunks(chat(ann, **asked, stream_options=options))
    steps = [chunk["step"] for chunk in found if "step" in chunk]
    assert [step["calls"][0]["status"] for step in steps] == ["waiting", "ok"]
    assert steps[-1]["calls"][0]["result"] == "42"
    assert found[-1]["usage"]["prompt_tokens"] == 40
    house.app.state.fleet = Scripted(*script)
    plain = chunks(chat(ann, **asked))
    assert all("step" not in chunk and chunk["choices"] for chunk in plain)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in plain) == "I count. 42"


def test_the_official_client_reads_a_call_of_its_own_streamed_and_whole(house, people):
    ann, _ = people
    client = openai.OpenAI(
        base_url="http://testserver/v1",
        api_key=ann.headers["Authorization"][7:],
        http_client=house.inside,
        max_retries=0,
    )
    asked = {
        "model": "everloop",
        "messages": [{"role": "user", "content": "What is the weather?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}],
    }
    said = "I look." + call("weather", n=1) + call("weather", n=2)
    house.app.state.fleet = Scripted(said)
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "I look."
    assert [made.function.arguments for made in whole.message.tool_calls] == ['{"n": 1}', '{"n": 2}']
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert [made.function.arguments for made in streamed.message.tool_calls] == ['{"n": 1}', '{"n": 2}']
    results = [{"role": "tool", "tool_call_id": made.id, "content": "sunny"} for made in whole.message.tool_calls]
    house.app.state.fleet = fleet = Scripted("Sunny.")
    again = [*asked["messages"], whole.message.model_dump(exclude_none=True, exclude={"refusal"}), *results]
    assert client.chat.completions.create(**{**asked, "messages": again}).choices[0].message.content == "Sunny."
    assert fleet.payloads[0]["messages"][-1]["content"].count("sunny") == 2


def test_a_person_lowers_a_level_and_raises_none_above_the_ceiling(people):
    ann, ben = people
    tools = {tool["name"]: tool for tool in ann("GET", "/v1/tools").json()["data"]}
    assert [(tools[name]["ceiling"], tools[name]["level"]) for name in ("calculator", "mine", "date_time")] == [
        ("auto", "off"),
        ("ask", "off"),
        ("off", "off"),
    ]
    assert ann("PUT", "/v1/tools/calculator", {"level": "ask"}).json()["level"] == "ask"
    assert code(ann("PUT", "/v1/tools/mine", {"level": "auto"})) == (400, "level_above_ceiling")
    assert code(ann("PUT", "/v1/tools/date_time", {"level": "ask"})) == (400, "level_above_ceiling")
    assert code(ann("PUT", "/v1/tools/nothing", {"level": "off"})) == (404, "unknown_tool")
    theirs = {tool["name"]: tool["chosen"] for tool in ben("GET", "/v1/tools").json()["data"]}
    assert set(theirs.values()) == {None}
    assert ann("PUT", "/v1/tools/calculator", {"level": None}).json()["level"] == "off"


def test_one_finds_ones_own_past_and_nobody_elses(house, people):
    ann, ben = people
    talk = ann("POST", "/v1/conversations", {}).json()["id"]
    house.app.state.fleet = Scripted("The heron stands in the reeds.")
    said = [{"role": "user", "content": "Where is the heron?"}]
    assert chat(ann, conversation=talk, messages=said).status_code == 200
    for person, found in ((ann, 1), (ben, 0)):
        house.app.state.fleet = Scripted(call("search_past", words="heron reeds"), "There.")
        body = chat(person, server_tools=["search_past"]).json()
        result = json.loads(body["choices"][0]["steps"][0]["calls"][0]["result"])
        assert len(result) == found and all("reeds" in each["answer"] for each in result)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "tekst"}}}]},
            "tools.0.function",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "a", "parameters": {"type": "object", "properties": 3}},
                    }
                ]
            },
            "tools.0.function",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0"),
        ({"server_tools": ["nothing"]}, "server_tools"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(people, body, param):
    error = chat(people[0], **body)
    assert error.status_code == 400 and error.json()["error"]["param"].startswith(param)
