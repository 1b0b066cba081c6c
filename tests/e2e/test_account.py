"""Signing in, and one's account: as somebody does it who comes for the first time."""

import uuid
from urllib.parse import quote

import openai
import pytest
from playwright.sync_api import expect

from infra.access import accounts
from infra.access.roles import Role
from infra.stack import embedded
from tests.e2e.browsing import ask, shoot, violations

PASSWORD = "a quiet brown harbour"


@pytest.fixture
def stranger(browser, stack, problems):
    """A page of a browser that nobody has signed in with."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert not problems


@pytest.fixture
def ada(stack):
    """Somebody with a password; their name."""
    name = f"Ada {uuid.uuid4().hex[:6]}"
    with stack.sessions.begin() as session:
        account = accounts.create(session, name, Role.USER)
        accounts.set_password(session, account, PASSWORD)
    return name


def fill(page, name, password):
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    button = page.get_by_role("button", name="Sign in")
    expect(button).to_be_enabled()  # the script is there
    button.press("Enter")


@pytest.mark.parametrize("width", [360, 1280])
def test_who_signs_in_comes_where_they_wanted_to(stranger, stack, ada, width):
    stranger.set_viewport_size({"width": width, "height": 800})
    stranger.goto(f"{stack.settings.public_url}/taught")
    expect(stranger.get_by_role("heading", name="Sign in")).to_be_visible()
    shoot(stranger, f"login-{width}")
    assert violations(stranger) == [] and stranger.evaluate("document.documentElement.scrollWidth") <= width
    fill(stranger, ada, "not this one at all")
    expect(stranger.get_by_role("alert")).to_have_text("The name or the password is wrong.")
    fill(stranger, ada, PASSWORD)
    expect(stranger.get_by_role("heading", name="What I taught it")).to_be_visible()
    assert stranger.url == f"{stack.settings.public_url}/taught"


def test_the_address_that_is_printed_signs_in_once(stranger, stack):
    address = embedded.way_in(stack.settings)
    stranger.goto(address)
    ask(stranger, "Say hello.")
    expect(stranger.locator(".release")).to_contain_text("base", timeout=60_000)
    assert "#" not in stranger.url
    stranger.goto(f"{stack.settings.public_url}/account")
    expect(stranger.locator("#who")).to_have_text("owner, admin")
    stranger.get_by_role("button", name="Sign out").click()
    expect(stranger.get_by_role("heading", name="Sign in")).to_be_visible()
    stranger.goto(address)
    expect(stranger.get_by_role("alert")).to_contain_text("This link was used")


def test_a_link_that_somebody_sent_does_not_sign_one_in_unseen(page, stack):
    page.goto(embedded.way_in(stack.settings))
    expect(page.get_by_role("status")).to_contain_text("You are signed in as somebody")
    assert page.evaluate("fetch('/v1/session').then((r) => r.json())")["account"]["name"] != "owner"
    page.get_by_role("button", name="Use the link to sign in").click()
    expect(page.locator("#prompt")).to_be_visible()
    assert page.evaluate("fetch('/v1/session').then((r) => r.json())")["account"]["name"] == "owner"


@pytest.mark.parametrize(
    "onwards", ["https://evil.example/", "//evil.example", "/.//evil.example", "javascript:alert(1)"]
)
def test_a_link_leads_to_no_other_site(stranger, stack, ada, onwards):
    stranger.goto(f"{stack.settings.public_url}/login?next={quote(onwards)}")
    fill(stranger, ada, PASSWORD)
    stranger.wait_for_url(lambda url: "/login" not in url)
    assert stranger.url.startswith(f"{stack.settings.public_url}/")


@pytest.mark.parametrize("width", [360, 1280])
def test_a_key_of_the_page_works_with_the_official_client_until_it_is_revoked(page, stack, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{stack.settings.public_url}/account")
    page.get_by_label("What for").fill("a script <b>of mine</b>")
    page.get_by_role("button", name="Make a key").click()
    secret = page.locator("#secret code")
    expect(secret).to_contain_text("everloop_")
    expect(page.locator("#keys h3")).to_have_text("a script <b>of mine</b>")
    shoot(page, f"account-{width}")
    assert violations(page) == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    client = openai.OpenAI(base_url=f"{stack.settings.public_url}/v1", api_key=secret.inner_text(), max_retries=0)
    asked = {"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert client.chat.completions.create(**asked).model == "base"
    page.get_by_role("button", name="Revoke").click()
    expect(page.locator("#keys li")).to_have_count(0)
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(**asked)


def test_a_password_is_set_and_signs_in(page, stranger, stack):
    page.goto(f"{stack.settings.public_url}/account")
    expect(page.locator("#no-password")).to_be_visible()
    page.get_by_label("The new one").fill("too short")
    page.get_by_role("button", name="Set the password").click()
    expect(page.locator("#password-state")).to_be_hidden()
    page.get_by_label("The new one").fill(PASSWORD)
    page.get_by_role("button", name="Set the password").click()
    expect(page.locator("#password-state")).to_contain_text("It is set.")
    name = page.locator("#who").inner_text().rpartition(",")[0]
    stranger.goto(f"{stack.settings.public_url}/account")
    fill(stranger, name, PASSWORD)
    expect(stranger.locator("#who")).to_contain_text(name)


def test_a_page_that_is_signed_out_meanwhile_asks_to_sign_in_and_keeps_the_draft(page, stack, problems):
    page.fill("textarea#prompt", "What I was about to say")
    with stack.sessions.begin() as session:
        name = page.evaluate("fetch('/v1/session').then((r) => r.json())")["account"]["name"]
        accounts.end_sessions(session, accounts.get(session, name))
    page.wait_for_timeout(2500)  # as long as the gate believes what it has read
    page.press("textarea#prompt", "Enter")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    with stack.sessions.begin() as session:
        accounts.set_password(session, accounts.get(session, name), PASSWORD)
    fill(page, name, PASSWORD)
    expect(page.locator("textarea#prompt")).to_have_value("What I was about to say")
    problems.clear()  # the console tells of each refusal


def test_who_only_chats_sees_no_operators_page(stranger, stack, ada):
    stranger.goto(f"{stack.settings.public_url}/operate")
    fill(stranger, ada, PASSWORD)
    expect(stranger.locator("body")).to_contain_text("This needs the role operator; yours is user.")
