"""What people see of tools: calls and results that may be hostile, a call that waits for a yes, and levels."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import expect

from feedback import conversations, episodes, tool_calls
from feedback.episodes import Recording
from tests.e2e.browsing import ask, me, shoot, violations

HOSTILE = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>" onfocus="window.pwned=1" '
    "[a](javascript:alert(1))"
)


def a_call(status="ok", result=None, error=None, **more):
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    return {
        "id": "call_1", "tool": "files__read", "source": "files", "arguments": {"path": "notes.txt"},
        "level": "ask", "status": status, "result": result, "error": error, "started_at": None,
        "ms": 12.0 if result else None,
        **({"expires_at": until} if status == "pending" else {}), **more,
    }  # fmt: skip


def step(*calls, text=""):
    return {"step": 1, "text": text, "offered": [], "calls": list(calls), "tokens": 1, "prompt_tokens": 1}


def events(*chunks, episode="ep_x", reason="stop"):
    """Return a stream: steps as they are, and texts."""
    lines = []
    for chunk in chunks:
        if isinstance(chunk, dict):
            lines.append({"id": episode, "model": "base", "choices": [], "step": chunk})
        else:
            lines.append({"id": episode, "model": "base", "choices": [{"delta": {"content": chunk}}]})
    lines.append({"id": episode, "model": "base", "choices": [{"delta": {}, "finish_reason": reason}]})
    return "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"


@pytest.fixture
def answer(page):
    """A function that has the server answer the next question, or go on, with a stream."""
    page.route("**/v1/episodes/*", lambda route: route.fulfill(json={"solicited": None, "score": None}))

    def answer(stream, path="**/v1/chat/completions"):
        page.route(path, lambda route: route.fulfill(content_type="text/event-stream", body=stream))

    return answer


def is_unharmed(page):
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert page.locator(".message.assistant :is(img, script)").count() == 0
    assert page.locator('.message.assistant a[href^="javascript"]').count() == 0


def test_calls_are_quiet_lines_and_hostile_words_stay_words(page, answer):
    hostile = a_call(result=HOSTILE, arguments={"path": HOSTILE}, tool=HOSTILE[:64])
    failed = a_call("error", error=HOSTILE, arguments=HOSTILE, id="call_2")
    answer(events("I look. ", step(hostile, failed, text="I look. "), "It says so."))
    ask(page, "What do my notes say?")
    lines = page.locator(".message.assistant .call")
    expect(lines).to_have_count(2)
    expect(page.locator(".message.assistant .text")).to_have_text("It says so.")
    expect(page.locator(".message.assistant .calls > div > p")).to_have_text("I look.")
    for line in lines.all():
        expect(line.locator("pre").first).to_be_hidden()
        line.locator("summary").press("Enter")
    expect(lines.nth(0).locator(".returned")).to_have_text(HOSTILE)
    expect(lines.nth(1).locator(".returned")).to_have_text(f"Error: {HOSTILE}")
    is_unharmed(page)
    assert not violations(page)
    shoot(page, "tools")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_call_that_waits_is_approved_from_the_keyboard_and_the_answer_goes_on(page, answer):
    said = []

    def decide(route):
        said.append((route.request.url.rpartition("/")[2], route.request.post_data_json))
        route.fulfill(json={})

    answer(events(step(a_call("pending", arguments={"path": HOSTILE})), reason="tool_calls"))
    page.route("**/v1/tool_calls/*", decide)
    answer(events(step(a_call(result="Milk")), "Buy milk.", episode="ep_y"), "**/v1/chat/completions/ep_x/continue")
    ask(page, "What do my notes say?")
    card = page.get_by_role("group", name="A tool asks")
    expect(card).to_contain_text("files__read")
    expect(card.locator("pre")).to_contain_text("onerror")
    expect(page.locator(".note")).to_have_text("It waits for your yes.")
    expect(page.locator(".actions")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "prompt", "it took the focus away"
    is_unharmed(page)
    assert not violations(page)
    shoot(page, "tool-asks")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    card.get_by_role("button", name="Approve").press("Enter")
    expect(page.locator(".message.assistant .text")).to_have_text("Buy milk.")
    assert said == [("call_1", {"decision": "approve"})]
    expect(card).to_have_count(0)
    expect(page.locator(".call .outcome")).to_have_text("12 ms")
    expect(page.locator(".actions")).to_be_visible()


def test_a_call_that_was_given_up_says_so(page, answer, problems):
    gone = {"error": {"message": "The call is given up; ask again.", "code": "tool_call_expired"}}
    answer(events(step(a_call("pending")), reason="tool_calls"))
    page.route("**/v1/tool_calls/*", lambda route: route.fulfill(status=409, json=gone))
    ask(page, "What do my notes say?")
    card = page.get_by_role("group", name="A tool asks")
    card.get_by_role("button", name="Deny").click()
    expect(card.get_by_role("status")).to_contain_text("ask again")
    expect(card.get_by_role("button")).to_have_count(0)
    assert len(problems) == 1 and "409" in problems.pop()


def test_stored_calls_are_shown_again_and_stay_words(page, stack):
    user = me(page)
    with stack.sessions.begin() as session:
        key, _ = episodes.begin(session, user, True)
        talk = conversations.create(session, user, None).id
        fields = {"user_id": user, "release": "base", "adapter_digest": None, "canary_id": None, "arm": "champion"}
        fields |= {"propensity": 1.0, "sampling": {}, "learn": True, "status": "complete", "conversation_id": talk}
        fields |= {"messages": [{"role": "user", "content": "What do they say?"}]}
        first = Recording(
            episodes.new_episode_id(datetime.now(UTC) - timedelta(minutes=1)), **fields, finish_reason="tool_calls",
            steps=[step(a_call("pending", id="call_stored"))],
        )  # fmt: skip
        made = a_call(result=HOSTILE, arguments={"path": HOSTILE})
        steps = [{"continues": first.episode_id}, step(made), {"stop": "answered"}]
        second = Recording(
            episodes.new_episode_id(), **fields, answer="They do.", finish_reason="stop", steps=steps
        )
        for recording in (first, second):
            episodes.record(session, recording, key)
        assert [asked.id for asked in tool_calls.page(session, user, "pending", 10)] == ["call_stored"]
    page.goto(f"{stack.settings.public_url}/c/{talk}")
    expect(page.locator(".message.assistant .text")).to_have_text("They do.")  # one turn, not two
    page.locator(".call summary").click()
    expect(page.locator(".call .returned")).to_have_text(HOSTILE)
    is_unharmed(page)


def test_a_person_sees_the_tools_and_lowers_a_level(page, stack):
    page.goto(f"{stack.settings.public_url}/account")
    select = page.get_by_label("How far calculator may go")
    expect(select).to_have_value("off")
    assert select.locator("option").all_inner_texts() == ["Off", "Ask me each time", "Go ahead"]
    select.select_option("ask")
    expect(page.locator("#tools-state")).to_have_text("Saved: calculator, ask me each time.")
    page.reload()
    expect(select).to_have_value("ask")
    assert not violations(page)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
