"""A real browser for the pages, and what every page must not do."""

import os
import shutil
import uuid

import pytest
from playwright.sync_api import expect, sync_playwright

from infra.access import accounts, sessions
from infra.access.gate import cookie_name
from infra.access.roles import Role

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
expect.set_options(timeout=15_000)  # the machine may stand still for a moment
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")  # no longer: while it is there, nobody else may run an event loop
def browser():
    if CHROMIUM is None:
        pytest.skip("No Chromium was found; install one or name it in CHROMIUM.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def signed_in(stack, role=Role.ADMIN, name=None):
    """Return the cookie of a browser in which somebody new has signed in."""
    with stack.sessions.begin() as session:
        account = accounts.create(session, name or f"somebody {uuid.uuid4().hex[:8]}", role)
        token = sessions.begin(session, account, days=1)
    return {"name": cookie_name(stack.settings), "value": token, "url": stack.settings.public_url}


@pytest.fixture
def problems():
    """What the console complained of, and addresses elsewhere that were asked; none may be left."""
    return []


@pytest.fixture
def page(browser, stack, problems):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_cookies([signed_in(stack)])
    page = context.new_page()
    own = stack.settings.public_url
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((own, "data:")) else None)
    page.goto(own)
    yield page
    context.close()
    assert not problems
