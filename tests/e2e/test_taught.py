"""Both pages of people: what became of what they said, being forgotten, and whether everybody can use them."""

import pytest
from playwright.sync_api import expect

from feedback.tables import Episode, Erasure, User
from tests.conftest import wait_until
from tests.e2e.browsing import ask, me, shoot, violations
from tests.e2e.test_markdown import RICH, answer


def test_a_thumb_is_followed_and_its_giver_is_forgotten(page, stack):
    page.get_by_role("link", name="What I taught it").click()
    expect(page.locator("#nothing")).to_be_visible()
    page.get_by_role("link", name="Back to the chat").click()
    ask(page, "What is the longest river?")
    page.locator('.assistant button[data-thumb="1"]').click(timeout=60_000)
    expect(page.locator(".assistant .meta .state")).to_have_text("Saved")
    page.goto(f"{stack.settings.public_url}/taught")
    receipt = page.locator(".receipt")
    expect(receipt.locator(".way li").nth(1)).to_contain_text("good", timeout=30_000)  # it is looked at again
    expect(receipt.locator(".way .reached")).to_have_count(2)
    expect(receipt).to_contain_text("moved the belief")
    receipt.get_by_text("The answer, then and now").click()
    expect(receipt.locator(".asked")).to_have_text("What is the longest river?")
    receipt.get_by_role("button", name="What does it say now?").click()
    expect(receipt.locator(".sides > div")).to_have_count(2, timeout=60_000)
    expect(receipt.locator(".sides h4").nth(1)).to_contain_text("Now, by release")
    shoot(page, "taught")
    user = me(page)
    with stack.sessions() as session:
        asked = session.query(Episode).filter_by(user_id=user).order_by(Episode.id).all()
        assert [episode.learn for episode in asked] == [True, False]

    page.locator("#forget").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#sure")).to_be_hidden()
    page.locator("#forget").click()
    page.locator("#sure").get_by_role("button", name="Forget me").click()
    expect(page.locator("#report")).to_contain_text("You are forgotten", timeout=60_000)
    expect(page.locator("#nothing")).to_be_visible()
    shoot(page, "forgotten")
    assert me(page) != user
    with stack.sessions() as session:
        assert session.get(User, user) is None and session.query(Erasure).count() > 0


def test_whether_it_learns_from_me_is_mine_to_say(page, stack, problems):
    page.goto(f"{stack.settings.public_url}/taught")
    switch = page.get_by_role("switch")
    expect(switch).to_be_enabled()
    before = switch.is_checked()
    switch.press("Space")
    expect(page.locator("#learn-note")).to_contain_text("will not be learned" if before else "may be learned")

    def said():
        with stack.sessions() as session:
            row = session.get(User, me(page))
            return row is not None and row.learn is (not before)

    wait_until(said)
    page.reload()
    expect(switch).to_be_enabled()
    assert switch.is_checked() is not before
    page.route("**/v1/me/consent", lambda route: route.fulfill(status=503, json={"error": {"message": "Not now."}}))
    switch.press("Space")
    expect(page.locator("#problem")).to_have_text("Not now.")
    assert switch.is_checked() is not before, "it shows what holds"
    assert "503" in problems.pop()


def test_there_is_nothing_to_forget_of_a_stranger(page, stack, problems):
    page.goto(f"{stack.settings.public_url}/taught")
    page.locator("#forget").click()
    page.locator("#sure").get_by_role("button", name="Forget me").click()
    expect(page.locator("#report")).to_have_text("There is nothing of you here.")
    assert "404" in problems.pop()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_them(page, stack, scheme, width):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})
    assert violations(page) == []
    answer(page, RICH)
    page.locator(".correct").click()
    page.evaluate("scroller.scrollTo(0, 0)")
    assert violations(page) == []
    rows = [
        {"id": f"fb_{n}", "episode_id": "ep_x", "kind": kind, "given_at": "2026-11-25T20:00:00Z", "status": status,
         "reason": None, "reward": reward, "training": training, "summary": "What became of it, in a sentence."}
        for n, (kind, status, reward, training) in enumerate([
            ("thumb", "accepted", None, []),
            ("correction", "learned", {"update_seq": 2, "p_before": None, "p_after": 0.71}, [
                {"run_id": "run_1", "role": "train", "status": "succeeded", "release": "r-1", "fate": "promoted"}]),
            ("preference", "learned", {"update_seq": 1, "p_before": 0.4, "p_after": 0.6}, [
                {"run_id": "run_1", "role": "gates", "status": "held", "release": "r-2", "fate": "rolled_back"}]),
            ("rating", "superseded", None, []),
        ])
    ]  # fmt: skip
    page.route("**/v1/me/receipts*", lambda route: route.fulfill(json={"data": rows, "next_before": None}))
    page.goto(f"{stack.settings.public_url}/taught")
    expect(page.locator(".receipt")).to_have_count(4)
    expect(page.locator(".receipt").nth(1).locator(".reached")).to_have_count(4)
    expect(page.locator(".receipt").nth(3)).to_contain_text("you said something later")
    expect(page.locator(".receipt").nth(3).locator("li").nth(2)).to_contain_text("not used")
    expect(page.locator(".receipt").nth(2).locator("li").nth(1)).to_contain_text("40% → 60% good")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
    shoot(page, f"story-{width}", scheme)
    page.locator("#forget").click()
    assert violations(page) == []


def test_what_it_cannot_see_is_said_until_it_can(page, stack, problems):
    page.goto(f"{stack.settings.public_url}/taught")
    expect(page.locator("#nothing")).to_be_visible()
    page.route("**/v1/me/receipts*", lambda route: route.fulfill(status=503, json={"error": {"message": "Away."}}))
    expect(page.locator("#problem")).to_have_text("Away.", timeout=10_000)
    page.unroute("**/v1/me/receipts*")
    expect(page.locator("#problem")).to_have_text("", timeout=10_000)
    assert problems and all("503" in problem for problem in problems)
    problems.clear()
