"""A real browser for the pages, and what every page must not do."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
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


@pytest.fixture
def problems():
    """What the console complained of, and addresses elsewhere that were asked; none may be left."""
    return []


@pytest.fixture
def page(browser, stack, problems):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    own = stack.settings.public_url
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((own, "data:")) else None)
    page.goto(own)
    yield page
    context.close()
    assert not problems
