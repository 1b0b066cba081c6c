"""MCP servers that behave, and one that does not: a real one, over stdio and over HTTP."""

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripted import Scripted, call, settings, turn, world

SERVER = Path(__file__).parents[1] / "mcp_server.py"
ENDS_S = 60


@pytest.fixture(params=["stdio", "http"])
def server(request):
    """The settings of the server, started or to be started."""
    if request.param == "stdio":
        yield {"command": sys.executable, "args": [str(SERVER)]}
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {"url": f"http://127.0.0.1:{port}/mcp"}
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def have(database, tmp_path):
    """A function that has turns with the server's tools, which may be called at once; returns their first calls."""

    def have(server, *calls, level="auto", **setup):
        setup = {"mcp_servers": {"bad": server}, "tool_levels": {"bad__*": level}, **setup}
        configured = settings(tmp_path, **setup)

        async def inside():
            async with world(database, configured) as (book, toolbox):
                await toolbox.listed(ENDS_S)
                offered = [name for name in toolbox.tools if name.startswith("bad__")]
                found = []
                for said in calls:
                    for _ in range(100):  # a server that died is there again soon
                        if toolbox.servers[0].is_there:
                            break
                        await asyncio.sleep(0.1)
                    one, *_ = await turn(book, toolbox, configured, Scripted(said, "Well."), server_tools=offered)
                    assert one.recording.answer == ("Well." if level == "auto" else "")
                    found.append(one.recording.steps[0]["calls"])
                return found, toolbox

        return asyncio.run(asyncio.wait_for(inside(), ENDS_S))

    return have


def test_a_servers_tools_are_called(have, server):
    ((made,),), toolbox = have(server, call("bad__echo", text="Grüße"))
    assert (made["source"], made["status"], made["result"]) == ("bad", "ok", "Grüße")
    assert any("bad__not_a_schema" in problem and "left out" in problem for problem in toolbox.problems)
    assert any("two tools 'bad__same_name'" in problem for problem in toolbox.problems)


def test_they_ask_unless_the_operator_says_otherwise(have, server):
    ((made,),), _ = have(server, call("bad__die"), tool_levels={}, level="ask")
    assert made["status"] == "pending"


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        (call("bad__slow"), "timed_out", "within 0.5 s"),
        (call("bad__large"), "error", "more than 4194304 bytes"),
        (call("bad__binary"), "error", "no text"),
        (call("bad__picture"), "error", "no text (image)"),
        (call("bad__fail"), "error", "It cannot be done."),
        (call("bad__echo"), "invalid", "'text' is a required property"),
        (call("bad__elsewhere", text="x"), "invalid", "points to what is not in it"),
    ],
)
def test_what_goes_wrong_there_is_an_error_result_and_the_server_goes_on(have, server, said, status, told):
    timeout_s = 0.5 if status == "timed_out" else 30.0
    ((made,), (after,)), _ = have(server, said, call("bad__echo", text="again"), tool_timeout_s=timeout_s)
    assert made["status"] == status and told in made["error"]
    assert after["result"] == "again"


def test_a_megabyte_is_cut(have, server):
    ((made,),), _ = have(server, call("bad__large", megabytes=1))
    assert made["status"] == "ok" and "of 1048576 bytes]" in made["result"]


def test_a_server_that_dies_ends_its_call_and_no_more(have, server):
    if "url" in server:
        ((made, echoed),), _ = have(server, call("bad__die") + call("calculator", expression="1"))
        assert made["status"] == "error" and echoed["status"] == "unknown"
        return
    both = call("bad__die") + call("bad__slow", seconds=30)
    ((died, other), (after,)), _ = have(server, both, call("bad__echo", text="again"))
    assert died["status"] == other["status"] == "error" and died["error"] == "bad died."
    assert after["result"] == "again"


def test_a_server_that_only_hangs_is_begun_anew(have, server):
    found, _toolbox = have(server, *[call("bad__slow")] * 2, call("bad__echo", text="again"), tool_timeout_s=2.0)
    assert [made["status"] for (made,) in found] == ["timed_out", "timed_out", "ok"]


def test_a_server_that_is_not_there_keeps_nobody(have):
    (_, toolbox) = have({"command": "/no/such/program"})
    assert toolbox.tools.keys() == {"calculator", "date_time", "search_past"}
    assert "its program is not there" in toolbox.problems[0]


def test_a_child_sees_none_of_our_secrets(have, server, monkeypatch):
    if "url" in server:
        pytest.skip("what runs elsewhere has its own environment")
    for name in ("EVERLOOP_SERVICE_KEY", "EVERLOOP_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a secret")
    ((made,),), _ = have({**server, "env": {"ITS_OWN": "1"}}, call("bad__environment"))
    names = set(made["result"].split())
    assert "ITS_OWN" in names and "PATH" in names
    assert not {name for name in names if name.startswith(("EVERLOOP", "AWS"))}


def test_orders_in_a_result_change_nothing(have, server):
    ((made,),), toolbox = have(server, call("bad__orders"))
    assert made["status"] == "ok" and "<|im_start|>" in made["result"]  # the raw log has what was returned
    assert toolbox.ceiling(toolbox.tools["bad__die"]) == "auto" == toolbox.settings.tool_levels["bad__*"]
