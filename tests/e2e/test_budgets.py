"""What people feel, as figures: frames while scrolling through thousands of messages, the first paint, new words.

A noisy machine must not fail them: the best of three runs has to meet each. ``EVERLOOP_BUDGETS_REPORT`` names a
file for the figures.
"""

import json
import os
import statistics
from pathlib import Path

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from infra.ids import new_id
from tests.e2e.browsing import ask, me
from tests.e2e.conftest import signed_in

RUNS = 3
MAX_FRAME_MS, MAX_PAINT_MS, MAX_LAG_MS = 100.0, 1000.0, 50.0
WHEEL_PX, WHEEL_EVERY_MS = 2000, 40


def best_of(name, limit, measure):
    """Measure until a run meets the limit (if there is one), at most three times; report the best figures."""
    runs = []
    for _ in range(RUNS):
        runs.append(measure())
        if limit is None or runs[-1]["figure"] <= limit:
            break
    best = min(runs, key=lambda run: run["figure"])
    told = {name: {"limit": limit, "best": best, "runs": [run["figure"] for run in runs]}}
    print(json.dumps(told))
    if report := os.environ.get("EVERLOOP_BUDGETS_REPORT"):
        path = Path(report)
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | told, indent=2))
    assert limit is None or best["figure"] <= limit, told


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


_TURNS = sa.text("""
    INSERT INTO episodes (id, user_id, release, arm, propensity, messages, answer, status, finish_reason, sampling,
                          token_ids, logprobs, num_prompt_tokens, latency_ms, learn, conversation_id, parent_id)
    SELECT :low || lpad(to_hex(n), 20, '0'), :user, 'base', 'champion', 1.0,
           jsonb_build_array(jsonb_build_object('role', 'user', 'content', 'Question ' || n || '?')),
           'Answer ' || n || E'.\n\n' || repeat('Some *more* words. ', 5 + n % 40) || E'\n\n- one\n- two',
           'complete', 'stop', '{}', '{}', '{}', 1, 1.0, false, :conversation,
           CASE WHEN n > 0 THEN :low || lpad(to_hex(n - 1), 20, '0') END
    FROM generate_series(0, :last) AS n
""")


def keep_long(page, stack, num_turns):
    """Write a long conversation straight into the tables; return its address."""
    user = me(page)
    answer = stack.http.post("/v1/conversations", json={}, headers={"X-Everloop-User": user})
    conversation = answer.json()["id"]
    with stack.sessions.begin() as session:
        low = new_id("ep")[:15]
        session.execute(_TURNS, {"low": low, "user": user, "conversation": conversation, "last": num_turns - 1})
    return f"{stack.settings.public_url}/c/{conversation}"


FRAMES = """() => {
  window.frames = [];
  let last = performance.now();
  const note = (now) => { frames.push(now - last); last = now; requestAnimationFrame(note); };
  requestAnimationFrame(note);
}"""


def taken(page):
    """Return the frames since the last time; the test itself takes seconds to look among so many messages."""
    page.wait_for_timeout(100)
    return page.evaluate("frames.splice(0).slice(1)")


def wheel(page, towards, is_there):
    while not page.evaluate(is_there):
        page.mouse.wheel(0, towards * WHEEL_PX)
        page.wait_for_timeout(WHEEL_EVERY_MS)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_turns", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_thousands_of_messages_scroll_without_a_long_frame(page, stack, num_turns):
    address = keep_long(page, stack, num_turns)

    def scroll():
        page.goto(address)
        expect(page.get_by_text(f"Answer {num_turns - 1}.")).to_be_in_viewport()
        page.locator("#scroller").hover()
        page.evaluate(FRAMES)
        wheel(page, -1, "scroller.scrollTop === 0 && document.querySelector('#older').hidden")
        frames = taken(page)
        assert page.locator(".message").count() < 200, "what is far from the screen is still on the page"
        expect(page.locator(".message").get_by_text("Question 0?")).to_be_in_viewport()
        taken(page)
        wheel(page, 1, "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop < 2")
        frames += taken(page)
        expect(page.get_by_text(f"Answer {num_turns - 1}.")).to_be_in_viewport()
        longest = [round(each, 1) for each in sorted(frames)[-5:]]
        return {
            "figure": max(frames),
            "n": len(frames),
            "p50_ms": quantile(frames, 0.5),
            "p99_ms": quantile(frames, 0.99),
            "longest_ms": longest,
        }

    best_of(f"longest frame while scrolling {2 * num_turns} messages up and down, ms", MAX_FRAME_MS, scroll)


def test_the_first_paint_comes_within_a_second(browser, stack):
    def once():
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        context.add_cookies([signed_in(stack)])
        page = context.new_page()
        page.goto(stack.settings.public_url)
        paint = page.evaluate(
            """() => new Promise((resolve) => new PerformanceObserver((list) => {
              const [entry] = list.getEntriesByName('first-contentful-paint');
              if (entry) resolve(entry.startTime);
            }).observe({ type: 'paint', buffered: true }))"""
        )
        context.close()
        return paint

    def measure():
        paints = [once() for _ in range(5)]
        return {"figure": statistics.median(paints), "n": 5, "all_ms": [round(each, 1) for each in paints]}

    best_of("first contentful paint, median, ms", MAX_PAINT_MS, measure)


# Notes when each piece with words arrives, and when the frame that shows it has been drawn: the page changes within
# a frame's callback, so a message that is posted then comes right after that frame.
LAGS = """
  window.lags = [];
  let waiting = [];
  const original = window.fetch;
  window.fetch = async (...request) => {
    const isChat = `${request[0]}`.endsWith('/chat/completions');
    const response = isChat && window.canned ? canned() : await original(...request);
    if (!isChat || !response.ok) return response;
    const note = new TransformStream({
      transform(piece, controller) {
        if (/"content": ?"[^"]/.test(new TextDecoder().decode(piece))) waiting.push(performance.now());
        controller.enqueue(piece);
      },
    });
    return new Response(response.body.pipeThrough(note), { status: response.status, headers: response.headers });
  };
  document.addEventListener('DOMContentLoaded', () => {
    new MutationObserver((changes) => {
      const isText = ({ target }) => target.matches?.('.text') || target.parentElement?.closest('.assistant .text');
      if (!changes.some(isText)) return;
      const seen = waiting;
      waiting = [];
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => lags.push(...seen.map((at) => performance.now() - at));
      port2.postMessage(0);
    }).observe(document.querySelector('#messages'), { childList: true, subtree: true, characterData: true });
  });
"""


# An answer that comes as from an engine on a machine of its own: a word every 33 ms.
CANNED = r"""
  window.canned = () => {
    let left = 240;
    const next = () => {
      const choice = left
        ? { index: 0, delta: { content: left % 40 ? `word${left} ` : 'end.\n\n' }, finish_reason: null }
        : { index: 0, delta: {}, finish_reason: 'stop' };
      return `data: ${JSON.stringify({ id: 'ep_canned', model: 'base', choices: [choice] })}\n\n`;
    };
    return new Response(new ReadableStream({
      async pull(controller) {
        await new Promise((resolve) => setTimeout(resolve, 33));
        controller.enqueue(new TextEncoder().encode(next()));
        if (left === 0) controller.close();
        left -= 1;
      },
    }), { headers: { 'content-type': 'text/event-stream' } });
  };
"""


@pytest.mark.parametrize("source", ["an engine on this machine", "elsewhere"])
def test_words_are_on_the_screen_soon_after_they_come(page, stack, problems, source):
    page.add_init_script(LAGS)
    if source == "elsewhere":
        page.add_init_script(CANNED)
        page.route("**/v1/episodes/ep_canned", lambda route: route.fulfill(json={"solicited": None, "score": None}))

    def measure():
        page.goto(stack.settings.public_url)
        ask(page, "Write a long story about a lighthouse and its keeper.")
        expect(page.locator("button#stop")).to_be_visible()
        expect(page.locator("button#stop")).to_be_hidden(timeout=120_000)
        lags = page.evaluate("lags")
        assert len(lags) >= 20
        return {"figure": quantile(lags, 0.95), "n": len(lags), "p50_ms": quantile(lags, 0.5), "max_ms": max(lags)}

    # Beside an engine that takes both cores a browser without a GPU waits for its turn: told, not required.
    limit = MAX_LAG_MS if source == "elsewhere" else None
    best_of(f"token to screen, p95, from {source}, ms", limit, measure)
    problems.clear()  # nobody else knows the canned answer's episode
