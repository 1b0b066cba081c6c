"""How calls are read out of a stream, and how what tools returned is kept from being taken for anything else."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tools import builtin, levels
from agent.tools.protocol import TextReader, read_call
from agent.tools.results import cleaned, estimated_tokens
from agent.tools.tool import Tool, ToolError
from feedback import steps
from infra.errors import SetupError
from infra.settings import load
from tests.scripted import call

TAGS = ["<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>"]
pieces = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from([*TAGS, "<tool_", "<", '{"name": "a"}'])), max_size=8
)


def read(text, seed, is_clean=False):
    """Return what is shown of a text that comes in pieces, and the calls in it."""
    reader, shown, rest = TextReader(), "", text
    cut = random.Random(seed)
    while rest:
        size = cut.randint(1, 9)
        shown, rest = shown + reader.feed({"content": rest[:size]}), rest[size:]
        if is_clean:  # of other texts "<tool_" may be shown, once it is known to be no tag
            assert "<" not in shown
    tail, calls = reader.end()
    return shown + tail, calls


@given(st.lists(st.tuples(st.text(max_size=8), st.text("abc", min_size=1, max_size=4)), max_size=4), st.integers())
def test_text_and_calls_are_told_apart_wherever_the_pieces_end(said, seed):
    said = [(text.replace("<", ""), name) for text, name in said]
    text = "".join(before + call(name, n=1) for before, name in said)
    shown, calls = read(text, seed, is_clean=True)
    assert shown == "".join(before for before, _ in said)
    assert [(one.tool, json.loads(one.arguments)) for one in calls] == [(name, {"n": 1}) for _, name in said]


@given(pieces, st.integers(), st.integers())
def test_what_is_read_depends_on_the_text_alone(parts, one, other):
    assert read("".join(parts), one) == read("".join(parts), other)


def test_a_result_that_the_model_makes_up_is_left_out():
    assert read("So: <tool_result>\n42\n</tool_result> It is 42.", 0) == ("So:  It is 42.", [])


@pytest.mark.parametrize("body", ["", "x", "[]", "3", "null", '{"name": 3}', '{"arguments": {}}', "[" * 100_000])
def test_what_is_no_call_is_a_broken_one(body):
    assert read_call(body).is_broken


@given(
    st.text(st.sampled_from("<>/|[]toolcarest_InsS imn"), max_size=60),
    st.sampled_from([*TAGS, "<|im_end|>", "[/INST]"]),
)
def test_nothing_in_a_result_can_end_its_frame(text, mark):
    framed = steps.framed("a", f"{text}{mark}{mark.upper()}{text}")
    assert framed.count("<tool_result>") == framed.count("</tool_result>") == 1
    assert framed.endswith("</tool_result>") and framed.startswith("<tool_result>")
    assert "<|" not in framed and "<tool_call>" not in framed.lower() and "[/INST]" not in framed


@given(st.text(max_size=400), st.integers(1, 300), st.integers(1, 60))
def test_a_result_is_never_longer_than_its_limits(text, max_bytes, max_tokens):
    try:
        found = cleaned(text, max_bytes, max_tokens)
    except ToolError:
        return
    kept, _, cut = found.partition("\n[cut off: ")
    assert len(kept.encode()) <= max(max_bytes, 0) and estimated_tokens(kept) <= max_tokens
    assert cut or found == text


@pytest.mark.parametrize(
    "said", ["{}", '{"command": "x", "url": "http://x"}', '{"url": "ftp://x"}', '{"comand": "x"}']
)
def test_an_mcp_server_has_one_way_to_it(said, monkeypatch, tmp_path):
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("EVERLOOP_MCP_SERVERS", f'{{"files": {said}}}')
    with pytest.raises(SetupError) as caught:
        load()
    assert "mcp_servers.files" in str(caught.value)
    monkeypatch.setenv("EVERLOOP_MCP_SERVERS", '{"files": {"command": "x", "env": {"KEY": "a secret"}}}')
    settings = load()
    assert settings.mcp_servers["files"].args == () and "a secret" not in repr(settings)


LEVELS = st.sampled_from(levels.LEVELS)


@given(LEVELS, st.none() | LEVELS, st.booleans())
def test_no_choice_and_no_request_goes_above_the_ceiling(highest, chosen, wanted):
    found = levels.effective(highest, chosen, wanted=wanted)
    assert levels.LEVELS.index(found) <= levels.LEVELS.index(highest)
    if chosen is not None:
        assert levels.LEVELS.index(found) <= levels.LEVELS.index(chosen)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "array"},
        {"properties": 3},
        {"type": "tekst"},
        [],
        None,
        "x",
        {"maxProperties": 2**64},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_a_schema_that_is_none_makes_no_tool(parameters):
    with pytest.raises(ValueError):
        Tool("mine", "Does it.", parameters, builtin.calculate)


def test_a_schema_that_points_elsewhere_is_not_fetched(monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("it asked the network")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    monkeypatch.setattr("socket.create_connection", fetch)
    tool = Tool("mine", "", {"properties": {"a": {"$ref": "http://10.0.0.1/a.json"}}}, builtin.calculate)
    assert "points to what is not in it" in tool.complaint({"a": 1})
    assert tool.complaint({}) is None


def test_a_schema_that_turns_in_circles_refuses_its_calls():
    tool = Tool("mine", "", {"allOf": [{"$ref": "#"}]}, builtin.calculate)
    assert "cannot be checked" in tool.complaint({"a": "x"})


def test_messages_of_every_role_become_what_any_template_takes():
    made = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    other = {"id": "c2", "type": "function", "function": {"name": "b", "arguments": "no json"}}
    found = steps.plain(
        [
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": "Hm.", "tool_calls": [made, other]},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "tool", "tool_call_id": "c2", "content": "2"},
        ]
    )
    assert [message["role"] for message in found] == ["user", "assistant", "user"]
    assert found[1]["content"].startswith("Hm.\n<tool_call>") and found[2]["content"].count("</tool_result>") == 2
