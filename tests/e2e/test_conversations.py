"""Conversations that are kept, in a real browser: found again after a reload, renamed, searched, deleted."""

import json
import re
import uuid

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from feedback.tables import Conversation, Episode, Feedback
from tests.conftest import wait_until
from tests.e2e.browsing import ask, me, shoot, violations
from tests.integration.test_conversations import record

HOSTILE = "<img src=x onerror=window.hit=1>"
ADDRESS = re.compile(r"/c/cv_[0-9a-f]{32}$")


@pytest.fixture
def keep(page, stack):
    """Write a conversation of the page's user straight into the tables; return its id and its turns'."""

    def write(*turns, title=None, user=None):
        user = user or me(page)
        answer = stack.http.post("/v1/conversations", json={"title": title}, headers={"X-Everloop-User": user})
        conversation, parent, ids = answer.json()["id"], None, []
        for question, answer in turns:
            parent = record(stack.sessions, user, question, answer, conversation, parent)
            ids.append(parent)
        return conversation, ids

    return write


def open_(page, stack, conversation):
    page.goto(f"{stack.settings.public_url}/c/{conversation}")


def links(page):
    return page.locator("#talk-list a")


def item(page, name):
    return page.locator("#talk-list li").filter(has_text=name)


def test_a_conversation_begins_with_its_first_message_and_is_there_after_a_reload(page, stack):
    texts, prompt = page.locator(".message .text"), page.locator("textarea#prompt")
    expect(page.locator("#talk-note")).to_have_text("What you ask is kept here.")
    prompt.fill("What is")
    page.wait_for_timeout(300)
    with stack.sessions() as session:
        assert not session.scalars(sa.select(Conversation.id).where(Conversation.user_id == me(page))).all()
    ask(page, "What is a ford?")
    expect(page.locator(".assistant .actions")).to_be_visible(timeout=60_000)
    expect(page).to_have_url(ADDRESS)
    expect(links(page)).to_have_text(["What is a ford?"])
    expect(links(page)).to_have_attribute("aria-current", "page")
    expect(page.locator("#talk-list h2")).to_have_text(["Today"])
    page.locator('.assistant [data-thumb="-1"]').click()
    page.get_by_role("button", name="Too short").click()
    expect(page.locator(".meta .state")).to_have_text("Saved")
    before = texts.all_text_contents()
    page.locator("textarea#prompt").fill("Half a thought")
    page.reload()
    expect(texts).to_have_text(before)
    expect(page.locator('.assistant [data-thumb="-1"]')).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Too short")).to_have_attribute("aria-pressed", "true")
    expect(prompt).to_have_value("Half a thought")
    ask(page, "And a bridge?")
    expect(page.locator(".assistant .actions")).to_have_count(2, timeout=60_000)
    expect(page.locator("button#stop")).to_be_hidden(timeout=60_000)
    page.get_by_role("button", name="New chat").click()
    expect(texts).to_have_count(0)
    expect(prompt).to_have_value("")
    page.go_back()
    expect(texts).to_have_count(4)
    page.go_forward()
    expect(page.locator("#empty")).to_be_visible()
    page.go_back()
    with stack.sessions() as session:
        rows = session.scalars(sa.select(Episode).where(Episode.user_id == me(page)).order_by(Episode.id)).all()
    assert [row.parent_id for row in rows] == [None, rows[0].id] and len({row.conversation_id for row in rows}) == 1
    assert len(rows[1].messages) == 3


def test_branches_and_what_was_said_survive_a_reload(page, stack, keep):
    user = me(page)
    conversation, (one, two) = keep(("One", "1"), ("Two", "2"))
    again = record(stack.sessions, user, "One", "I", conversation)
    edited = record(stack.sessions, user, "Two, shorter", "II", conversation, again)
    for body in ({"kind": "thumb", "value": 1}, {"kind": "correction", "text": "Two!"}):
        body |= {"episode_id": two, "user": user, "idempotency_key": uuid.uuid4().hex}
        assert stack.http.post("/v1/feedback", json=body).status_code == 202
    open_(page, stack, conversation)
    texts = page.locator(".message .text")
    expect(texts).to_have_text(["One", "I", "Two, shorter", "II"])
    expect(page.locator(".versions span").first).to_have_text("2/2")
    page.get_by_role("button", name="Earlier version").first.click()
    expect(texts).to_have_text(["One", "1", "Two", "2"])
    expect(page.locator('.assistant [data-thumb="1"]').nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".correct").nth(1)).to_have_text("Corrected")
    page.get_by_role("button", name="Try again").nth(1).click()
    expect(page.locator(".versions span").nth(1)).to_have_text("2/2", timeout=60_000)
    expect(page.locator("button#stop")).to_be_hidden(timeout=60_000)
    page.reload()
    expect(page.locator(".versions span").nth(1)).to_have_text("2/2")
    expect(page.locator(".versions span").nth(0)).to_have_text("1/2")
    with stack.sessions() as session:
        newest = session.scalars(
            sa.select(Episode).where(Episode.conversation_id == conversation).order_by(Episode.id.desc())
        ).first()
    assert newest.parent_id == one and newest.id > edited and newest.messages[-1]["content"] == "Two"


def test_what_broke_off_and_was_tried_again_is_no_version_after_a_reload(page, stack, keep):
    conversation, (broken,) = keep(("Why?", "Beca"))
    record(stack.sessions, me(page), "Why?", "Because.", conversation)
    with stack.sessions.begin() as session:
        session.execute(sa.update(Episode).where(Episode.id == broken).values(status="failed"))
    open_(page, stack, conversation)
    texts = page.locator(".message .text")
    expect(texts).to_have_text(["Why?", "Because."])
    expect(page.locator(".versions")).to_be_hidden()
    record(stack.sessions, me(page), "And then?", "Nothing.", conversation, broken)  # somebody went on from it
    page.reload()
    expect(page.locator(".versions span").first).to_have_text("1/2")


def test_stopping_does_not_wait_for_a_conversation_that_is_being_made(page, stack):
    page.route("**/v1/conversations", lambda route: None if route.request.method == "POST" else route.continue_())
    ask(page, "What is a moor?")
    expect(page.locator("button#stop")).to_be_visible()
    page.press("textarea#prompt", "Escape")
    expect(page.locator("button#stop")).to_be_hidden(timeout=2_000)
    expect(page.locator(".problem p").first).to_have_text("Stopped before the answer began.")


def test_two_tabs_write_into_one_conversation(page, stack, keep):
    conversation, _ = keep(("One", "1"))
    other = page.context.new_page()
    for tab in (page, other):
        open_(tab, stack, conversation)
        expect(tab.locator(".message .text")).to_have_count(2)
    for tab, question in ((page, "From the first"), (other, "From the second")):
        ask(tab, question)
    for tab in (page, other):
        expect(tab.locator("button#stop")).to_be_hidden(timeout=60_000)
    page.reload()
    expect(page.locator(".versions span").nth(1)).to_have_text("2/2")
    other.close()


def test_conversations_are_renamed_searched_and_deleted(page, stack, keep):
    boats, _ = keep(("What is a boat?", "It floats."))
    keep(("What is a train?", "It has wheels."))
    page.reload()
    expect(links(page)).to_have_text(["What is a train?", "What is a boat?"])
    item(page, "boat").hover()
    shoot(page, "list")
    item(page, "boat").get_by_role("button", name="Rename").click()
    field = page.get_by_label("New name")
    expect(field).to_be_focused()
    field.fill("Never mind")
    field.press("Escape")
    expect(item(page, "boat").get_by_role("button", name="Rename")).to_be_focused()
    page.keyboard.press("Enter")
    field.fill(HOSTILE)
    shoot(page, "rename")
    field.press("Enter")
    expect(links(page)).to_have_text(["What is a train?", HOSTILE])
    search = page.get_by_label("Search conversations")
    search.fill("wheels")
    expect(links(page)).to_have_text(["What is a train?"])
    shoot(page, "search")
    search.fill("nowhere to be found")
    expect(page.locator("#talk-note")).to_have_text("Nothing found.")
    search.fill("floats")
    expect(links(page)).to_have_text([HOSTILE])
    links(page).click()
    expect(page.locator(".message .text")).to_have_text(["What is a boat?", "It floats."])
    search.fill("")
    expect(links(page)).to_have_count(2)
    page.locator('.assistant [data-thumb="1"]').click()
    expect(page.locator(".meta .state")).to_have_text("Saved")
    row = page.locator("#talk-list li:has([aria-current])")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(
        "Deleted conversations are no longer learned from. What earlier nights learned stays until you ask to be "
        "forgotten."
    )
    expect(dialog).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    expect(links(page)).to_have_count(2)
    row.get_by_role("button", name="Delete").press("Enter")
    shoot(page, "delete")
    dialog.get_by_role("button", name="Delete").click()
    expect(links(page)).to_have_text(["What is a train?"])
    expect(page).to_have_url(re.compile("/$"))
    expect(page.locator("#empty")).to_be_visible()
    assert page.evaluate("window.hit") is None
    with stack.sessions() as session:
        assert session.get(Conversation, boats) is None
        thumbs = session.scalars(
            sa.select(Feedback.value).where(Feedback.user_id == me(page)).order_by(Feedback.seq)
        ).all()
    assert thumbs == [1, 0]


def test_markup_in_a_question_and_a_title_stays_text(page, stack, keep):
    conversation, _ = keep((HOSTILE, HOSTILE))
    open_(page, stack, conversation)
    expect(page.locator(".message .text")).to_have_text([HOSTILE, HOSTILE])
    expect(links(page)).to_have_text([HOSTILE])
    assert page.locator("#messages img, #talks img").count() == 0 and page.evaluate("window.hit") is None


def test_an_unknown_address_says_so_and_offers_a_new_chat(page, stack, problems, keep):
    theirs, _ = keep(("A secret", "Yes."), user=f"other-{uuid.uuid4().hex}")
    for conversation in ("cv_nope", theirs):
        open_(page, stack, conversation)
        expect(page.locator("#missing p")).to_have_text("There is no such conversation. It may have been deleted.")
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    shoot(page, "unknown")
    page.get_by_role("button", name="Start a new chat").click()
    expect(page.locator("#empty")).to_be_visible()
    expect(page).to_have_url(re.compile("/$"))
    assert all("404" in problem for problem in problems) and problems
    problems.clear()


def test_a_server_that_cannot_be_read_is_said_and_the_page_still_chats(page, stack, problems, keep):
    conversation, _ = keep(("One", "1"))
    page.route("**/v1/conversations**", lambda route: route.fulfill(status=500, json={"error": {"message": "No."}}))
    page.reload()
    expect(page.locator("#talk-note")).to_have_text("The list cannot be read just now.")
    ask(page, "What is a moat?")
    expect(page.locator(".assistant .actions")).to_be_visible(timeout=60_000)
    expect(page.locator(".assistant .text")).not_to_be_empty()
    page.route("**/turns**", lambda route: route.abort())
    open_(page, stack, conversation)
    expect(page.locator("#missing p")).to_have_text("This conversation cannot be read just now.")
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".message .text")).to_have_text(["One", "1"])
    problems.clear()


def test_the_drawer_is_opened_used_and_closed_by_keyboard(page, stack, keep):
    keep(("What is a barge?", "A boat."))
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    button, search = page.get_by_role("button", name="Conversations", exact=True), page.get_by_label("Search conv")
    expect(links(page)).to_have_count(1)
    expect(links(page)).to_be_hidden()
    button.focus()
    page.keyboard.press("Enter")
    expect(search).to_be_focused()
    expect(button).to_have_attribute("aria-expanded", "true")
    page.wait_for_timeout(300)
    shoot(page, "drawer")
    for _ in range(12):  # the focus stays in
        page.keyboard.press("Tab")
        assert page.evaluate("!document.activeElement.closest('.bar, main, .dock')")
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    expect(search).to_be_hidden()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(links(page)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".message .text")).to_have_text(["What is a barge?", "A boat."])
    expect(links(page)).to_be_hidden()
    expect(page.locator("textarea#prompt")).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#empty")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_list(page, stack, keep, scheme, width):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})
    keep(("What is a canal?", "Water between banks."), title="Canals of the north, and what became of them since")
    conversation, _ = keep(("What is a lock?", "A gate."), ("Why?", "To lift boats."))
    open_(page, stack, conversation)
    expect(page.locator(".message .text")).to_have_count(4)
    assert violations(page) == []
    if width == 360:
        page.get_by_role("button", name="Conversations", exact=True).click()
        assert violations(page) == []
    shoot(page, f"talks-{width}", scheme)
    item(page, "Canals").hover()
    item(page, "Canals").get_by_role("button", name="Rename").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    item(page, "Canals").get_by_role("button", name="Delete").press("Enter")
    assert violations(page) == []
    shoot(page, f"delete-{width}", scheme)


def test_earlier_turns_come_as_one_scrolls_up_without_a_jump(page, stack, keep):
    conversation, _ = keep(*((f"Question {n}", f"Answer {n}. " + "More words. " * 30) for n in range(70)))
    open_(page, stack, conversation)
    expect(page.get_by_text("Answer 69.")).to_be_in_viewport()
    assert page.locator(".message.user").count() <= 60
    composer = page.locator("#composer").bounding_box()
    page.locator("#scroller").hover()
    questions, seen = page.locator(".message.user .text"), set()
    for _ in range(200):
        seen |= set(questions.all_text_contents())
        before = page.evaluate(FIRST_SEEN)
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(60)
        after = page.evaluate(TOP_OF, before["text"])
        assert -20 <= after - before["top"] <= 1300, (before, after)  # as many wheels as came at once
        if page.evaluate("scroller.scrollTop === 0 && document.querySelector('#older').hidden"):
            break
    expect(page.locator("#older")).to_be_hidden()
    shown = questions.all_text_contents()
    assert shown == [f"Question {n}" for n in range(len(shown))], "they are not in order, or one is missing"
    assert len(shown) < 45, "what is far from the screen is still on the page"
    assert seen | set(shown) == {f"Question {n}" for n in range(70)}
    assert page.locator("#composer").bounding_box() == composer


def test_turns_that_leave_the_page_come_back_as_they_were(page, stack, keep):
    turns = [(f"Question {n}", f"Answer {n}. " + "More words. " * 80) for n in range(28)]
    conversation, ids = keep(*turns)
    body = {"episode_id": ids[20], "user": me(page), "kind": "thumb", "value": -1, "idempotency_key": "then"}
    assert stack.http.post("/v1/feedback", json=body).status_code == 202
    open_(page, stack, conversation)
    answers = page.locator(".message.assistant")

    def answer(number):
        return answers.filter(has_text=re.compile(rf"Answer {number}\."))

    def pressed(number, value):
        return answer(number).locator(f'[data-thumb="{value}"][aria-pressed="true"]')

    expect(answer(27)).to_be_in_viewport()
    answer(27).locator('[data-thumb="1"]').click()
    answer(26).locator(".correct").click()
    answer(26).locator(".editor textarea").fill("Half a correction")
    expect(answer(26).locator(".changes")).not_to_be_empty()  # they have a height of their own
    expect(answer(27).locator(".meta .state")).to_have_text("Saved")
    page.locator("#prompt").click()
    page.evaluate("scroller.scrollTop = 0")
    expect(answer(0)).to_be_in_viewport()
    expect(answer(20)).to_have_count(0)
    height = page.evaluate("scroller.scrollHeight")
    page.evaluate("scroller.scrollTop = scroller.scrollHeight")
    expect(answer(27)).to_be_in_viewport()
    assert abs(page.evaluate("scroller.scrollHeight") - height) < 2, "what was not on the page had another height"
    expect(pressed(27, 1)).to_have_count(1)
    expect(answer(26).locator(".editor textarea")).to_have_value("Half a correction")
    answer(20).scroll_into_view_if_needed()
    expect(pressed(20, -1)).to_have_count(1)
    pressed(20, -1).click()
    expect(answer(20).locator(".meta .state")).to_have_text("Withdrawn")
    page.evaluate("scroller.scrollTop = 0")
    expect(answer(0)).to_be_in_viewport()
    page.evaluate("scroller.scrollTop = scroller.scrollHeight")
    expect(answer(20)).to_have_count(1)
    expect(pressed(20, -1)).to_have_count(0)


TOP_OF = """(text) => {
  const questions = [...document.querySelectorAll('.message.user')];
  return questions.find((m) => m.textContent === text).getBoundingClientRect().top;
}"""
FIRST_SEEN = """() => {
  const seen = [...document.querySelectorAll('.message.user')].find((m) => m.getBoundingClientRect().top > 100);
  return { text: seen.textContent, top: seen.getBoundingClientRect().top };
}"""


def busy(page, times, status=503, wait="2"):
    asked = []

    def refuse(route):
        asked.append(route.request.post_data_json)
        if len(asked) > times:
            return route.continue_()
        error = {"message": "Too many requests are waiting.", "code": "overloaded"}
        return route.fulfill(
            status=status, headers={"Retry-After": wait, "Content-Type": "application/json"},
            body=json.dumps({"error": error}),
        )  # fmt: skip

    page.route("**/v1/chat/completions", refuse)
    return asked


@pytest.mark.parametrize(
    ("status", "said"), [(429, "Too many questions just now."), (503, "Too many requests are waiting.")]
)
def test_a_busy_server_is_asked_again_after_a_countdown(page, problems, status, said):
    asked = busy(page, 1, status)
    ask(page, "What is a quay?")
    problem = page.locator(".problem")
    expect(problem.get_by_role("alert")).to_have_text(said)
    expect(problem).to_contain_text("Trying again in 2 s")
    assert problem.locator("[aria-hidden]").inner_text().startswith("Trying again"), "not each second is announced"
    expect(page.get_by_role("button", name="Retry", exact=True)).to_be_hidden()
    expect(problem).to_contain_text("Trying again in 1 s")
    expect(page.locator(".assistant .actions")).to_be_visible(timeout=60_000)
    expect(problem).to_be_hidden()
    assert len(asked) == 2 and str(status) in problems.pop()


def test_a_countdown_is_cut_short_or_left(page, problems):
    asked = busy(page, 2, wait="30")
    ask(page, "What is a pier?")
    expect(page.locator(".problem")).to_contain_text("Trying again in")
    shoot(page, "countdown")
    page.get_by_role("button", name="Try now").press("Enter")
    wait_until(lambda: page.wait_for_timeout(50) or len(asked) == 2)
    page.get_by_role("button", name="Leave it").click()
    expect(page.locator(".wait")).to_be_hidden()
    expect(page.get_by_role("button", name="Retry", exact=True)).to_be_focused()
    page.wait_for_timeout(1500)
    assert len(asked) == 2
    page.reload()
    expect(page.locator("textarea#prompt")).to_have_value("What is a pier?")
    assert len(problems) == 2 and all("503" in problem for problem in problems)
    problems.clear()


def test_files_are_refused_in_words_and_pasted_text_stays(page):
    button, said = page.get_by_role("button", name="Attach a file"), page.locator("#no-files")
    expect(button).to_have_attribute("aria-disabled", "true")
    composer = page.locator("#composer").bounding_box()
    expect(page.locator("#send")).to_be_visible()
    page.locator("body:not(.starting)").wait_for()
    button.focus()
    page.keyboard.press("Enter")
    expect(said).to_have_text("No model here reads files yet")
    shoot(page, "files")
    assert page.locator("#composer").bounding_box() == composer
    expect(said).to_have_text("", timeout=10_000)
    for kind in ("paste", "drop"):
        page.evaluate(GIVE, kind)
        expect(said).to_have_text("No model here reads files yet")
        expect(said).to_have_text("", timeout=10_000)
    page.locator("textarea#prompt").focus()
    assert page.evaluate(GIVE, "both") is False, "the text's own way is not stopped"
    expect(said).to_have_text("No model here reads files yet")


GIVE = """(kind) => {
  const data = new DataTransfer();
  data.items.add(new File(['x'], 'x.txt', { type: 'text/plain' }));
  if (kind === 'both') data.setData('text/plain', 'some words');
  const event = kind === 'drop'
    ? new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })
    : new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
  document.querySelector('#prompt').dispatchEvent(event);
  return event.defaultPrevented;
}"""
