"""What the tests of the pages do alike: ask, look with another eye, take pictures."""

import os
from pathlib import Path

from playwright.sync_api import expect

from infra.stack.parts import ROOT

AXE = ROOT / "infra" / "web" / "node_modules" / "axe-core" / "axe.min.js"


def ask(page, text):
    page.fill("textarea#prompt", text)
    expect(page.locator("#send")).to_be_enabled()  # the script is there
    page.press("textarea#prompt", "Enter")


def me(page):
    """Return who the page takes its reader for."""
    return page.evaluate("import('/static/who.js').then((who) => who.whoAsks())")


def violations(page):
    """Return what axe finds against the page, with where."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]


def shoot(page, name, *schemes):
    """Take a picture in each theme, where EVERLOOP_SHOTS names a folder for them; the last theme stays."""
    if folder := os.environ.get("EVERLOOP_SHOTS"):
        for scheme in schemes or ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(100)
            page.screenshot(path=Path(folder) / f"{name}-{scheme}.png", full_page=True)
