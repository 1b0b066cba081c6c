"""The chat page in a real browser, against the real stack."""

import json
import re

import pytest
from playwright.sync_api import expect
from sqlalchemy.dialects.postgresql import insert

from feedback.tables import Episode, Feedback
from reward.tables import Solicitation
from tests.conftest import wait_until
from tests.e2e.browsing import ask, me, shoot, violations

INVITATION = "Was this helpful?"


def test_an_answer_streams_in_and_a_thumb_is_saved_and_withdrawn(page, stack):
    ask(page, "What is the capital of France?")
    up = page.locator('.message.assistant button[data-thumb="1"]')
    expect(up).to_be_visible(timeout=60_000)
    expect(page.locator(".release")).to_contain_text("base")
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    user = me(page)

    def thumbs():
        with stack.sessions() as session:
            rows = session.query(Feedback).filter_by(user_id=user, kind="thumb").order_by(Feedback.seq)
            return [row.value for row in rows]

    wait_until(lambda: thumbs() == [1])
    up.click()
    expect(up).to_have_attribute("aria-pressed", "false")
    wait_until(lambda: thumbs() == [1, 0])
    shoot(page, "chat")


def test_stop_keeps_the_partial_text_and_the_episode_is_interrupted(page, stack):
    ask(page, "Write a very long story about a lighthouse.")
    answer = page.locator(".message.assistant .text")
    expect(answer).to_contain_text(re.compile(r"\w+ \w+ \w+"), timeout=60_000)
    page.press("textarea#prompt", "Escape")
    expect(page.locator("button#stop")).to_be_hidden(timeout=10_000)
    user = me(page)

    def status():
        with stack.sessions() as session:
            row = session.query(Episode).filter_by(user_id=user).one_or_none()
            return row and row.status

    assert wait_until(status) == "interrupted"
    assert len(answer.inner_text().split()) >= 3


def test_markup_in_an_answer_stays_text(page):
    page.route("**/v1/episodes/ep_x", lambda route: route.fulfill(json={"solicited": None, "score": None}))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body='data: {"id":"ep_x","model":"base","choices":[{"index":0,"delta":{"content":'
            '"<img src=x onerror=alert(1)>"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
        ),
    )
    ask(page, "Hello")
    expect(page.locator(".message.assistant")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator(".message.assistant img").count() == 0


def test_it_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.fixture
def solicit(page, stack):
    """Decide, in the worker's place, whether a rating of the next answer is asked for; count the page's looks."""

    def decide(wanted, form="rating", held=None):
        """Where `held` is a list, looks are put there and get no answer."""
        looks = []

        def look(route):
            episode_id = route.request.url.rpartition("/")[2]
            looks.append(episode_id)
            with stack.sessions.begin() as session:
                if wanted:
                    asked = {"reason": "informative", "propensity": 1.0, "form": form}
                    row = insert(Solicitation).values(episode_id=episode_id, **asked)
                    session.execute(row.on_conflict_do_update(index_elements=["episode_id"], set_=asked))
                else:
                    session.query(Solicitation).filter_by(episode_id=episode_id).delete()
            route.continue_() if held is None else held.append(route)

        page.route("**/v1/episodes/*", look)
        return looks

    return decide


def test_a_rating_that_is_asked_for_is_asked_for_quietly_until_it_is_given(page, solicit):
    looks = solicit(True)
    ask(page, "What is the capital of France?")
    line = page.get_by_role("status").filter(has_text=INVITATION)
    expect(line).to_be_visible(timeout=60_000)
    assert page.evaluate("document.activeElement.id") == "prompt", "it took the focus away"
    shoot(page, "invitation")
    page.locator('.message.assistant button[data-thumb="-1"]').click()
    expect(page.get_by_text(INVITATION)).to_have_count(0)
    expect(page.get_by_role("button", name="Do not rate this answer")).to_be_hidden()
    expect(page.locator(".meta .state")).to_have_text("Saved")
    assert len(looks) == 1


def test_the_invitation_can_be_dismissed_from_the_keyboard(page, solicit):
    solicit(True)
    ask(page, "What is the capital of Spain?")
    button = page.get_by_role("button", name="Do not rate this answer")
    expect(button).to_be_visible(timeout=60_000)
    button.press("Enter")
    expect(page.get_by_text(INVITATION)).to_have_count(0)
    expect(page.locator('.message.assistant button[data-thumb="1"]')).to_be_focused()
    expect(page.locator('.message.assistant button[data-thumb="1"]')).to_have_attribute("aria-pressed", "false")


def test_a_rating_that_is_not_asked_for_is_never_mentioned(page, solicit):
    looks = solicit(False)
    ask(page, "What is the capital of Italy?")
    expect(page.locator(".message.assistant .actions")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(6000)
    assert 1 <= len(looks) <= 2, "it looks once, and once more where the score was late"
    assert page.get_by_text(INVITATION).count() == 0


def test_who_has_rated_already_is_not_asked(page, solicit):
    held = []
    solicit(True, held=held)
    ask(page, "What is the capital of Norway?")
    up = page.locator('.message.assistant button[data-thumb="1"]')
    expect(up).to_be_visible(timeout=60_000)
    up.click()
    expect(page.locator(".meta .state")).to_have_text("Saved")
    num_before = len(held)  # a slow machine may have looked before the thumb
    page.wait_for_timeout(5000)
    assert len(held) == num_before <= 1 and page.get_by_text(INVITATION).count() == 0


@pytest.fixture
def pair(page, solicit):
    """Two answers to one question, side by side."""
    solicit(True, form="pair")
    ask(page, "What is the capital of Portugal?")
    page.get_by_role("button", name="Show another answer").click(timeout=60_000)
    pair = page.locator(".pair")
    expect(pair.locator(".assistant")).to_have_count(2)
    expect(pair.get_by_role("status").first).to_have_text("Which one is better?", timeout=60_000)
    return pair


def said_by(page, stack, kind):
    user = me(page)
    with stack.sessions() as session:
        rows = session.query(Feedback).filter_by(user_id=user, kind=kind).all()
        return [(row.episode_id, row.over) for row in rows]


def test_of_two_answers_the_better_one_is_chosen_and_gone_on_with(page, stack, pair):
    expect(pair.locator(".release").first).to_be_hidden()
    shoot(page, "pair")
    chosen = pair.locator(".assistant").nth(1)
    text = chosen.locator(".text").text_content()
    assert violations(page) == []
    pair.get_by_role("button", name="Answer 2 is better").press("Enter")
    expect(pair).to_have_count(0)
    expect(page.locator(".assistant")).to_have_count(1)
    expect(page.locator(".assistant .text")).to_have_text(text)
    expect(page.locator(".assistant .meta .state")).to_have_text("Saved")
    expect(page.locator(".versions span")).to_have_text(re.compile("[12]/2"))
    (said,) = wait_until(lambda: said_by(page, stack, "preference"))
    assert said[0] != said[1] and None not in said
    page.locator('.assistant button[data-thumb="1"]').click()
    assert [said[0]] == [about for about, _ in wait_until(lambda: said_by(page, stack, "thumb"))]


def test_who_does_not_choose_just_goes_on(page, stack, pair):
    ask(page, "And of Spain?")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(pair).to_have_count(0)
    expect(page.locator(".assistant .actions").nth(1)).to_be_visible(timeout=60_000)
    assert said_by(page, stack, "preference") == []


def test_reasons_and_a_comment_say_why_and_are_taken_back_with_the_thumb(page, stack):
    ask(page, "What is a canal?")
    down = page.locator('.message.assistant button[data-thumb="-1"]')
    expect(page.locator(".reasons")).to_be_hidden()
    down.click(timeout=60_000)
    expect(page.locator(".chip")).to_have_count(11)
    page.get_by_role("button", name="Too long").click()
    page.get_by_role("button", name="Incorrect").press("Enter")
    page.get_by_label("Why, in your words").fill("It says nothing of locks.")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Why, in your words")).to_have_value("")
    user = me(page)

    def said(kind):
        with stack.sessions() as session:
            return session.query(Feedback).filter_by(user_id=user, kind=kind).order_by(Feedback.seq).all()

    wait_until(lambda: [row.reasons for row in said("reasons")] == [["too_long"], ["incorrect", "too_long"]])
    assert len(said("comment")) == 1
    shoot(page, "reasons")
    page.locator('.message.assistant button[data-thumb="1"]').click()
    expect(page.locator(".chip")).to_have_count(2)
    wait_until(lambda: said("reasons")[-1].reasons == [])
    page.locator('.message.assistant button[data-thumb="1"]').click()
    expect(page.locator(".reasons")).to_be_hidden()


def test_what_is_typed_before_the_script_is_there_is_a_draft(page):
    held = []
    page.route("**/static/chat.js", lambda route: held.append(route))
    page.reload(wait_until="commit")
    page.locator("textarea#prompt").fill("Faster than the script")
    wait_until(lambda: page.evaluate("1") and held, timeout_s=10)  # whoever evaluates has events come in
    held[0].continue_()
    expect(page.locator("#send")).to_be_enabled()
    assert page.evaluate("localStorage.getItem('everloop.draft')") == "Faster than the script"
    page.reload(wait_until="commit")
    page.locator("textarea#prompt").fill("And once more")
    wait_until(lambda: page.evaluate("1") and len(held) == 2, timeout_s=10)
    held[1].continue_()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("textarea#prompt")).to_have_value("Faster than the script\nAnd once more")
    page.locator("textarea#prompt").fill("")


def test_a_draft_survives_a_reload_and_a_failed_request(page, problems):
    prompt = page.locator("textarea#prompt")
    prompt.fill("What I was about to ask")
    expect(page.locator("#send")).to_be_enabled()  # the script is there, and has kept it
    page.reload()
    expect(prompt).to_have_value("What I was about to ask")
    expect(page.locator("#send")).to_be_enabled()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    prompt.press("Enter")
    expect(page.locator(".problem p")).to_have_text("The server could not be reached.")
    assert "ERR_FAILED" in problems.pop()
    page.reload()
    expect(prompt).to_have_value("What I was about to ask")
    expect(page.locator("#send")).to_be_enabled()  # the browser had the text back before the script was there
    page.unroute("**/v1/chat/completions")
    prompt.press("Enter")
    expect(page.locator(".release")).to_contain_text("base", timeout=60_000)
    page.reload()
    expect(prompt).to_have_value("")


def test_another_answer_and_another_question_are_versions_to_go_between(page, stack):
    asked = []

    def reply(route):
        body = route.request.post_data_json
        asked.append([body.get("parent"), *(message["content"] for message in body["messages"])])
        piece = {"content": f"Answer {len(asked)}."}
        chunk = {"id": f"ep_{len(asked)}", "model": "base"}
        choices = [{"index": 0, "delta": piece, "finish_reason": "stop"}]
        route.fulfill(
            content_type="text/event-stream",
            body=f"data: {json.dumps({**chunk, 'choices': choices})}\n\ndata: [DONE]\n\n",
        )

    hints = []

    def hint(route):
        hints.append((route.request.post_data_json["episode_id"], route.request.post_data_json["name"]))
        route.fulfill(status=202, json={"id": "fb_1"})

    page.route("**/v1/episodes/*", lambda route: route.fulfill(json={"solicited": None, "score": None}))
    page.route("**/v1/chat/completions", reply)
    page.route("**/v1/feedback", hint)
    texts = page.locator(".message .text")
    ask(page, "One")
    expect(texts).to_have_text(["One", "Answer 1."])
    expect(page.locator(".versions")).to_be_hidden()
    ask(page, "Two")
    expect(texts).to_have_text(["One", "Answer 1.", "Two", "Answer 2."])
    page.get_by_role("button", name="Try again").first.click()
    expect(texts).to_have_text(["One", "Answer 3."])
    assert asked[2] == [None, "One"] and hints == [("ep_1", "regenerated")]
    ask(page, "Three")
    expect(texts).to_have_text(["One", "Answer 3.", "Three", "Answer 4."])
    assert asked[3] == ["ep_3", "Three"], "the server has what was said before"
    expect(page.locator(".versions span").first).to_have_text("2/2")
    page.get_by_role("button", name="Earlier version").first.click()
    expect(texts).to_have_text(["One", "Answer 1.", "Two", "Answer 2."])
    expect(page.get_by_role("button", name="Earlier version").first).to_be_focused()
    page.fill("textarea#prompt", "Half a thought")
    page.locator(".resend").first.click()
    expect(page.locator("textarea#prompt")).to_have_value("One")
    expect(page.locator("#editing")).to_be_visible()
    page.press("textarea#prompt", "Escape")
    expect(page.locator("#editing")).to_be_hidden()
    expect(page.locator("textarea#prompt")).to_have_value("Half a thought")
    page.locator(".resend").nth(1).click()
    ask(page, "Two, but shorter")
    expect(texts).to_have_text(["One", "Answer 1.", "Two, but shorter", "Answer 5."])
    assert asked[4] == ["ep_1", "Two, but shorter"] and hints[1] == ("ep_2", "edited_and_resent")
    shoot(page, "versions")
    page.get_by_role("button", name="Later version").first.click()
    expect(texts).to_have_text(["One", "Answer 3.", "Three", "Answer 4."])
    page.get_by_role("button", name="New chat").click()
    expect(texts).to_have_count(0)


def test_a_correction_shows_what_it_changes_and_arrives(page, stack):
    ask(page, "What is a weir?")
    page.locator(".correct").click(timeout=60_000)
    field = page.locator(".editor textarea")
    expect(page.locator(".changes")).to_be_hidden()
    answer = field.input_value().strip()
    first, _, rest = answer.partition(" ")
    field.fill(f"Indeed {rest}")
    expect(page.locator(".changes del")).to_have_text(first)
    expect(page.locator(".changes ins")).to_have_text("Indeed")
    shoot(page, "correction")
    field.fill(answer)
    expect(page.locator(".changes")).to_be_hidden()
    field.fill(f"Indeed {rest}")
    page.locator(".send-correction").click()
    expect(page.locator(".correct span")).to_have_text("Corrected")
    user = me(page)
    with stack.sessions() as session:
        assert session.query(Feedback).filter_by(user_id=user, kind="correction").one().text == f"Indeed {rest}"


def test_who_types_before_the_script_is_there_loses_nothing(page):
    held = []
    page.route("**/static/chat.js", lambda route: held.append(route))
    page.reload(wait_until="commit")
    page.fill("textarea#prompt", "I was fast")
    expect(page.locator("#send")).to_be_disabled()
    wait_until(lambda: page.wait_for_timeout(50) or held)
    held[0].continue_()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("textarea#prompt")).to_have_value("I was fast")


def test_what_did_not_arrive_can_be_tried_again_whatever_else_did(page, stack, problems):
    ask(page, "What is a lock?")
    down = page.locator('.message.assistant button[data-thumb="-1"]')
    expect(down).to_be_visible(timeout=60_000)
    page.route("**/v1/feedback", lambda route: route.abort(), times=1)
    down.click()
    state = page.locator(".meta .state")
    expect(state).to_contain_text("Not saved")
    assert "ERR_FAILED" in problems.pop()
    page.get_by_role("button", name="Too long").click()
    user = me(page)

    def kinds():
        with stack.sessions() as session:
            return sorted(row.kind for row in session.query(Feedback).filter_by(user_id=user))

    wait_until(lambda: kinds() == ["reasons"])
    expect(state).to_contain_text("Not saved")
    page.get_by_role("button", name="Retry saving your rating").click()
    wait_until(lambda: kinds() == ["reasons", "thumb"])
    expect(state).to_have_text("Saved")


def test_a_failed_question_that_others_follow_stays_when_it_is_edited(page, problems):
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    ask(page, "First")
    expect(page.locator(".problem p").first).to_have_text("The server could not be reached.")
    assert "ERR_FAILED" in problems.pop()
    ask(page, "Second")
    expect(page.locator(".release").nth(1)).to_contain_text("base", timeout=60_000)
    expect(page.locator("button#stop")).to_be_hidden(timeout=60_000)
    page.get_by_role("button", name="Edit question").first.click()
    expect(page.locator("textarea#prompt")).to_have_value("First")
    expect(page.locator(".message.user")).to_have_count(2)


def test_the_api_is_documented_without_another_host(page, stack, problems):
    page.goto(f"{stack.settings.public_url}/docs")
    page.get_by_text("/v1/chat/completions").first.click(timeout=20_000)
    expect(page.get_by_role("button", name="Try it out")).to_be_visible()
    shoot(page, "api")
    # The library writes styles into what it draws, which the policy leaves out without harm.
    assert all("style" in each for each in problems), problems
    problems.clear()
