"""Memory on the page: what an answer was given, pins, and what is remembered of a person."""

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from agent.tables import Memory, TurnPlace
from tests.conftest import wait_until
from tests.e2e.browsing import ask, me, shoot, violations


def answered(page, number):
    expect(page.locator(".assistant .actions:visible")).to_have_count(number, timeout=60_000)
    expect(page.locator("button#stop")).to_be_hidden(timeout=60_000)


def test_what_was_said_is_used_and_shown_and_can_be_pinned(page, stack):
    ask(page, "My name is Ada. Say hello.")
    answered(page, 1)
    expect(page.locator(".recall details")).to_have_count(0)
    ask(page, "And now say goodbye.")
    answered(page, 2)
    line = page.locator(".recall summary")
    expect(line).to_have_text("Used 2 of 2 earlier messages, 1 memory")
    line.press("Enter")
    seen = page.locator(".recall li")
    expect(seen).to_have_count(3)
    expect(seen.nth(0)).to_contain_text("My name is Ada")
    expect(seen.nth(1)).to_contain_text("Say hello.")
    pin = page.get_by_role("button", name="Pin").first
    pin.press("Enter")
    expect(page.get_by_role("button", name="Pinned")).to_have_count(1)
    shoot(page, "recall")
    assert violations(page) == []
    page.reload()
    expect(page.get_by_role("button", name="Pinned")).to_have_count(1)
    expect(page.locator(".recall summary")).to_have_text("Used 2 of 2 earlier messages, 1 memory")

    def pinned():
        with stack.sessions() as session:
            return session.scalars(sa.select(TurnPlace).where(TurnPlace.pinned)).all()

    assert len(pinned()) == 1
    page.get_by_role("button", name="Pinned").click()
    wait_until(lambda: not pinned(), 10, "it is let go of")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_what_is_remembered_is_ones_own_to_change(page, stack, width, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{stack.settings.public_url}/memory")
    expect(page.locator("#nothing")).to_be_visible()
    page.get_by_label("Something else to remember").fill("I am allergic to walnuts.")
    page.keyboard.press("Enter")
    words = page.get_by_label("What is remembered")
    expect(words).to_have_value("I am allergic to walnuts.")
    words.fill("I am allergic to walnuts and pecans.")
    page.keyboard.press("Enter")
    expect(page.locator("#remember-note")).to_have_text("Saved.")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"memory-{width}")
    page.get_by_role("switch").press("Space")
    expect(page.locator("#remember-note")).to_contain_text("Nothing new is kept")
    page.reload()
    expect(page.get_by_role("switch")).not_to_be_checked()
    expect(words).to_have_value("I am allergic to walnuts and pecans.")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#nothing")).to_be_visible()
    with stack.sessions() as session:
        assert session.scalar(sa.select(Memory).where(Memory.user_id == me(page))) is None
    page.get_by_role("switch").press("Space")
    expect(page.locator("#remember-note")).to_contain_text("is remembered")
