"""Answers as Markdown in a real browser: shown as they grow, sanitised, with nothing from elsewhere."""

import json

import pytest
from playwright.sync_api import expect

from tests.e2e.browsing import ask, shoot

RICH = r"""# Rivers

A *river* runs to the **sea**; see [the map](https://example.org/map) and `flow()`.

- one
  - within it
- two

1. first
2. second

| name | length, km |
|:-----|-----------:|
| Nile | 6,650 |
| Rhine | 1,233 |

> It never stops.

```python
def flow(depth: float) -> float:
    # metres per second
    return 2.5 * depth ** 0.5
```

The speed is \(v = \sqrt{g h}\), so

$$E = \frac{1}{2} m v^2$$

It costs $5 and $6. Broken: \(\frac{1}\). ![a picture](https://example.org/x.png)
"""

HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 1">

[click](javascript:window.hit=1) [data](data:text/html,<script>1</script>) <https://ok.example/"onmouseover="x>

<div style="position:fixed;inset:0">over all</div>

```"><img src=x onerror=window.hit=1>
code
```

![x" onerror="window.hit=1](https://example.org/"onerror="window.hit=1)

| <svg onload=window.hit=1> | [x](vbscript:1) |
|---|---|
| a | b |

\\(\\href{javascript:window.hit=1}{x} \\includegraphics{https://example.org/x} \\htmlData{a=b}{c}\\)
"""


def answer(page, text, *, pieces=1):
    """Have the page's next answer be a text, in some pieces."""
    size = -(-len(text) // pieces)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    choices = [{"index": 0, "delta": {"content": part}, "finish_reason": None} for part in parts]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    body = "".join(
        f"data: {json.dumps({'id': 'ep_x', 'model': 'base', 'choices': [choice]})}\n\n" for choice in choices
    )
    page.route("**/v1/feedback", lambda route: route.fulfill(status=202, json={"id": "fb_x"}))
    page.route("**/v1/episodes/ep_x", lambda route: route.fulfill(json={"solicited": None, "score": None}))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"{body}data: [DONE]\n\n"),
    )
    ask(page, "Tell me.")
    expect(page.locator(".assistant .actions")).to_be_visible()
    return page.locator(".assistant .text").last


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_is_shown_as_it_was_meant(page, scheme):
    page.emulate_media(color_scheme=scheme)
    text = answer(page, RICH, pieces=40)
    expect(text.locator("h3")).to_have_text("Rivers")
    expect(text.locator("li li")).to_have_text("within it")
    expect(text.locator("td.to-right").first).to_have_text("6,650")
    link = text.locator("a").first
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    expect(text.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(text.locator("math")).to_have_count(2)
    expect(text.locator(".math.display math[display=block]")).to_have_count(1)
    expect(text).to_contain_text("It costs $5 and $6. Broken: \\(\\frac{1}\\).")
    expect(text.locator("a[href$='x.png']")).to_have_text("a picture")
    assert text.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    shoot(page, "markdown", scheme)
    page.set_viewport_size({"width": 360, "height": 800})
    shoot(page, "markdown-360", scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_is_complete_is_not_drawn_again_while_the_rest_comes(page):
    changes = page.evaluate(
        """async () => {
          const { Markdown } = await import('/static/markdown.js');
          const root = document.createElement('div');
          document.body.append(root);
          const shown = new Markdown(root);
          const text = 'First.\\n\\n- a\\n- b\\n\\nLast';
          const seen = [];
          for (let end = 1; end <= text.length; end += 1) {
            shown.text = text.slice(0, end);
            shown.draw(false);
            seen.push(root.firstElementChild);
          }
          return { first: new Set(seen.slice(6)).size, html: root.innerHTML };
        }"""
    )
    assert changes["first"] == 1
    assert changes["html"].count("<li>") == 2 and changes["html"].endswith("<p>Last</p>")


@pytest.mark.parametrize("text", ["\\[\nf = a\n+ b\n\\]", "$$\nx\n=\ny\n$$", "So\n$$\nx\n\n- y\n$$\nand on"])
def test_mathematics_on_lines_of_its_own_is_no_list_and_no_heading(page, text):
    shown = answer(page, text)
    expect(shown.locator(".math.display math")).to_have_count(1)
    expect(shown.locator("ul, h3, h4")).to_have_count(0)


def test_a_hostile_answer_stays_text(page):
    text = answer(page, HOSTILE)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    assert text.locator("script, img, svg, iframe, style, [style]:not(math *), [onerror], [onload]").count() == 0
    addresses = text.locator("a").evaluate_all("links => links.map(link => link.protocol)")
    assert set(addresses) <= {"https:", "http:", "mailto:"}
    expect(text).to_contain_text("<script>window.hit = 1</script>")


def test_code_and_answers_are_copied(page, stack):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=stack.settings.public_url)
    text = answer(page, RICH)
    text.locator(".code .copy").click()
    expect(text.locator(".code .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def flow(")
    page.locator(".actions .copy").click()
    expect(page.locator(".actions .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == RICH


def test_pages_are_under_a_strict_policy_and_small(page, stack):
    sizes = {}
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.setCacheDisabled", {"cacheDisabled": True})
    session.on(
        "Network.loadingFinished", lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]})
    )
    response = page.goto(stack.settings.public_url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.wait_for_load_state("networkidle")
    assert 20_000 < sum(sizes.values()) <= 250_000
    for path in ("/deployment", "/runs"):
        assert page.request.get(f"{stack.settings.public_url}{path}").headers["content-security-policy"] == policy
