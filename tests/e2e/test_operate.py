"""The operators' pages in a real browser, against the real stack."""

import re
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from deploy import autonomy, head, journal, registry
from deploy.rollout import Event
from deploy.runs import LOCK, TrainingRun
from deploy.tables import AuditEntry, Canary, Release
from feedback.tables import Episode, Feedback, User
from flows.bench.adapters import linear_shapes, write_adapter
from infra.db import LongLock
from reward.tables import GoldProbe, RewardUpdate
from tests.adapters import PLAN
from tests.conftest import wait_until
from tests.e2e.browsing import shoot, violations
from trainer.config import RunConfig
from trainer.record import RunRecord

MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture
def go(page, stack):
    def to(path):
        page.goto(stack.settings.public_url + path)

    return to


@pytest.fixture(scope="module")
def release(stack, tmp_path_factory):
    """A release that nobody has met."""
    directory = tmp_path_factory.mktemp("adapters") / "one"
    write_adapter(directory, linear_shapes(stack.settings.base_model_dir), 16, seed=11)
    with stack.sessions.begin() as session:
        return registry.register(session, stack.settings, directory, run_id=None, manifest={}).name


def champion(stack):
    return stack.http.get("/v1/deployment").json()["champion"]


def decide(page, why, word=None):
    """Fill the dialog, and send it from the keyboard."""
    page.locator("#act-reason").fill(why)
    field = page.locator("#act-reason")
    if word is not None:
        field = page.locator("#act-confirm")
        field.fill(word)
    field.press("Enter")


def test_an_operator_promotes_and_goes_back_in_two_clicks(page, go, stack, release):
    before = champion(stack)
    go("/operate/releases")
    page.get_by_role("button", name=f"Promote {release}").click()
    decide(page, "", release)
    decide(page, "promising", "something else")
    expect(page.get_by_role("alert")).to_have_text(f"Type {release} to confirm.")
    assert champion(stack) == before
    decide(page, "liked by twice as many of the raters", release)
    expect(page.locator("#act-replicas li")).to_contain_text(stack.settings.engine_url)
    expect(page.locator("#told")).to_have_text(f"Done: Promote {release}.", timeout=40_000)
    assert champion(stack) == release and stack.ask().model == release

    go("/operate")
    expect(page.locator(".serving .what")).to_contain_text(f"{release} answers everybody.")
    expect(page.locator(".serving")).to_contain_text("liked by twice as many")
    page.get_by_role("button", name=f"Roll back to {before}").click()  # the first click
    page.locator("#act-reason").fill("too terse")
    page.locator("#act-confirm").fill(before)
    page.locator("#act-do").click()  # the second
    expect(page.locator(".serving .what")).to_contain_text(f"{before} answers everybody.", timeout=40_000)
    assert champion(stack) == before and stack.ask().model == before

    go("/operate/audit")
    told = page.locator("#audit tr")
    expect(told.nth(0)).to_contain_text("rolled back by hand")
    page.get_by_role("button", name="Verify the chain").click()
    expect(page.locator("#verified")).to_contain_text("The chain holds")
    shoot(page, "operate-audit")


@pytest.fixture
def canary(stack, release):
    """An open canary of the release; its log is written by the test, and nobody watches it."""
    with stack.sessions.begin() as session:
        opened = head.open_canary(session, challenger=release, plan=PLAN, gates=[], actor="test", reason="a test")
        autonomy.set_level(session, stack.settings, "observe", actor="test", reason="a test")
    yield opened
    with stack.sessions.begin() as session:
        if session.get_one(Canary, opened.id).decision is None:
            head.close_canary(
                session, opened.id, decision="aborted", evidence={}, actor="test", reason="the test has ended"
            )
        autonomy.set_level(session, stack.settings, "auto", actor="test", reason="the test has ended")


def votes(stack, canary, number, good):
    arms = ("champion", "challenger")
    events = [
        event
        for at_s in range(number)
        for arm in arms
        for event in (Event(at_s, "trial", arm), Event(at_s, "vote", arm, good=good == arm or at_s % 7 == 0))
    ]
    with stack.sessions.begin() as session:
        session.get_one(Canary, canary.id, with_for_update=True)
        journal.append(session, canary.id, events)


def test_a_canary_is_followed_live_held_and_aborted(page, go, stack, canary, release):
    votes(stack, canary, 20, "challenger")
    go("/operate/rollout")
    expect(page.locator("h1")).to_contain_text(f"{release} against {champion(stack)}")
    expect(page.locator("#live")).to_have_text("live")
    row = page.get_by_role("row").filter(has_text="challenger").first
    expect(row).to_contain_text("100.0 % 20 of 20")
    page.evaluate("window.stays = true")
    page.locator("#chart-evidence summary").click()
    votes(stack, canary, 10, "challenger")
    expect(row).to_contain_text("30 of 30", timeout=10_000)  # by itself
    assert page.evaluate("window.stays") and page.locator("#chart-evidence table").is_visible()
    ink = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    assert page.locator("#chart-evidence canvas").evaluate(ink), "nothing was drawn"
    with page.expect_download() as told:
        page.get_by_role("link", name="CSV of Evidence over time").click()
    lines = Path(told.value.path()).read_text().splitlines()
    assert lines[0].startswith("minutes since it opened,better,worse") and len(lines) == 121
    shoot(page, "operate-rollout")

    page.get_by_role("button", name="Hold").click()
    decide(page, "wait for the morning", release)
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=10_000)
    go("/operate")
    expect(page.locator(".needs")).to_contain_text("The canary is held")
    expect(page.locator("#part-canary")).to_contain_text("50%")
    shoot(page, "operate-now")
    go("/operate/rollout")
    page.get_by_role("button", name="Abort").click()
    decide(page, "not now", release)
    expect(page.locator(".what")).to_contain_text("aborted: not now", timeout=10_000)
    assert stack.http.get("/v1/deployment").json()["canary_id"] is None


def test_a_proposal_waits_first_and_is_declined(page, go, stack, release):
    with stack.sessions.begin() as session:
        assert autonomy.propose(session, stack.settings, "canary", release, actor="test", reason=MARKUP)
    go("/operate")
    needs = page.locator(".needs li").filter(has_text=f"Let people meet {release}?")
    expect(needs).to_contain_text(MARKUP)
    needs.get_by_role("button", name="Decline").press("Enter")
    decide(page, f"not before the weekend {MARKUP}")
    expect(needs).to_have_count(0, timeout=10_000)
    go("/operate/audit")
    expect(page.locator("#audit tr").first).to_contain_text(f"not before the weekend {MARKUP}")


def test_the_autonomy_is_set_from_the_keyboard_alone(page, go, stack):
    go("/operate/rollout#autonomy")
    page.get_by_role("button", name="Set the autonomy to propose").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("a quiet week")
    page.keyboard.press("Tab")
    page.keyboard.type("propose")
    page.keyboard.press("Enter")
    expect(page.locator(".levels [aria-current]")).to_contain_text("propose", timeout=10_000)
    with stack.sessions.begin() as session:
        assert autonomy.level(session, stack.settings) == "propose"
        autonomy.set_level(session, stack.settings, "auto", actor="test", reason="the test has ended")


def test_a_run_is_followed_and_cancelled(page, go, stack, tmp_path):
    record = RunRecord(stack.sessions, stack.settings.runs_dir)
    record.create(RunConfig())
    record.phase("train", 40)
    record.progress(5)
    record.progress(10)
    record.metric(phase="train", step=1, loss=2.5)
    record.metric(phase="train", step=2, loss=1.5)
    record.metric(phase="peak", step=2, kl=4.0, proxy=1.0, gold=0.5, taken=True)
    go("/operate/learning")
    row = page.locator(f"tr#{record.run_id}")
    expect(row).to_contain_text("train 10 of 40, stopped, the next run goes on with it")
    with LongLock(stack.sessions, LOCK) as lock:
        assert lock.take()
        record.progress(20)
        expect(row).to_contain_text("train 20 of 40, about", timeout=10_000)
        row.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Keep it as it is").click()
        assert not record.is_cancelled()
        row.get_by_role("button", name="Cancel").click()
        decide(page, "<b>wrong</b> recipe")
        expect(row).to_contain_text("ends after its current step", timeout=10_000)
        assert record.is_cancelled()
        shoot(page, "operate-learning")
    row.get_by_role("link", name=record.run_id).click()
    expect(page.locator("#chart-loss tbody tr")).to_have_count(2)
    expect(page.locator("#chart-overoptimisation tbody")).to_contain_text("2")
    shoot(page, "operate-run")
    with stack.sessions.begin() as session:
        record.end(session, "cancelled", {"reason": "The run was cancelled."})
    expect(page.locator(".what")).to_contain_text("The run was cancelled.", timeout=10_000)


def say(stack, user, **signal):
    """Have a user get an answer and say something about it; return the episode's and the signal's ids."""
    episode = stack.ask("What is a canal?", user=user).id
    answer = stack.feedback(episode, user=user, **signal)
    assert answer.status_code == 202, answer.text
    return episode, answer.json()["id"]


def test_what_people_said_is_found_read_judged_and_excluded(page, go, stack):
    user = f"<i>{uuid.uuid4().hex}"
    word = f"w{uuid.uuid4().hex[:10]}"
    episode, thumb = say(stack, user, kind="thumb", value=-1)
    stack.feedback(episode, user=user, kind="comment", text=f"{MARKUP} {word}")
    go(f"/operate/feedback?words={word}")
    rows = page.get_by_role("region", name="Signals, the newest first").locator("tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(MARKUP)
    shoot(page, "operate-feedback")
    page.get_by_label("Words").fill("nobody-said-this")
    page.get_by_label("Words").press("Enter")
    expect(rows).to_have_text("Nothing that fits.")
    assert "words=nobody-said-this" in page.url, "the search can be shared"

    def last_action(said):
        with stack.sessions() as session:
            found = session.query(RewardUpdate).filter_by(feedback_id=said).order_by(RewardUpdate.seq.desc())
            return (row := found.first()) and row.action

    wait_until(lambda: last_action(thumb) == "add")
    go(f"/operate/feedback?words={word}")
    page.get_by_role("link", name="In context").click()
    expect(page.locator(".talk")).to_contain_text("What is a canal?")
    page.get_by_role("button", name="Judge it bad").click()
    decide(page, "it says nothing")
    expect(page.locator("main")).to_contain_text(
        re.compile("Judged bad by somebody [0-9a-f]{8}: it says nothing"), timeout=10_000
    )
    shoot(page, "operate-context")
    with stack.sessions() as session:
        probe = session.query(GoldProbe).filter_by(episode_id=episode).one().id
    wait_until(lambda: last_action(probe) == "add", what="nothing was learned of what an operator judged")
    page.get_by_role("button", name="Exclude", exact=True).click()
    decide(page, "it was a test", "exclude")
    expect(page.locator("main")).to_contain_text("excluded by an operator", timeout=10_000)
    wait_until(lambda: last_action(thumb) == "remove", what="what was learned from it stayed")
    wait_until(lambda: last_action(probe) == "remove", what="what an operator judged of it stayed")
    receipt = wait_until(
        lambda: (
            (r := stack.http.get(f"/v1/feedback/{thumb}/receipt", headers={"X-Everloop-User": user}).json())[
                "status"
            ]
            == "set_aside"
            and r
        )
    )
    assert receipt["reason"] == "answer_excluded"
    with stack.sessions() as session:
        assert session.query(GoldProbe).filter_by(episode_id=episode).count() == 1
        assert not session.get_one(Episode, episode).learn
        assert session.query(AuditEntry).filter_by(action="answer_excluded", subject=episode).count() == 1
    expect(page.get_by_role("button", name="Judge it good")).to_have_count(0)
    for path, body in (
        (f"/v1/episodes/{episode}/exclude", {}),
        ("/v1/probes", {"episode_id": episode, "good": True}),
    ):
        again = stack.http.post(path, json={"reason": "again", **body})
        assert again.json()["error"]["code"] == "not_learned_from"


def test_a_rater_is_excluded_and_reinstated(page, go, stack):
    user = f"team/{uuid.uuid4().hex}"
    episode, _ = say(stack, user, kind="thumb", value=1)

    def ruling():
        view = page.locator(".plain li").first
        return view.text_content()

    go(f"/operate/feedback/{episode}")
    expect(page.get_by_role("button", name=f"Exclude {user}")).to_be_visible(timeout=10_000)
    page.get_by_role("button", name=f"Exclude {user}").click()
    # What is asked about stays, whatever becomes of the button while the page reads itself anew.
    page.evaluate("""() => document.querySelectorAll('[data-act]').forEach((each) => {
      each.dataset.body = '{"rater": "somebody else", "ruling": "banned"}';
    })""")
    decide(page, "an advertiser", "exclude")
    expect(page.get_by_role("button", name=f"Reinstate {user}")).to_be_visible(timeout=10_000)
    assert "banned" in ruling()
    with stack.sessions() as session:
        row = session.query(AuditEntry).filter_by(action="rater_banned").order_by(AuditEntry.id.desc()).first()
        assert row.subject == session.get_one(User, user).key_id, "a name stands where it cannot be erased"
    assert user in stack.http.get("/operate/audit", params={"about": user}).text
    page.get_by_role("button", name=f"Reinstate {user}").click()
    decide(page, "an error")
    expect(page.get_by_role("button", name=f"Exclude {user}")).to_be_visible(timeout=10_000)


def test_two_releases_answer_the_same_prompt_blind(page, go, stack, release):
    go(f"/operate/compare?a=base&b={release}")
    with stack.sessions() as session:
        before = session.query(Episode).filter_by(learn=True).count()
    page.get_by_label("Prompt").fill("Name a colour.")
    page.get_by_role("button", name="Ask both").click()
    pair = page.locator(".pair")
    expect(pair).to_be_visible(timeout=60_000)
    assert sorted(pair.locator("h3").all_text_contents()) == ["Answer 1", "Answer 2"]
    pair.get_by_role("button", name="This one is better").first.click()
    assert sorted(pair.locator("h3").all_text_contents()) == sorted(["base", release])
    expect(page.locator("#tally")).to_contain_text("about the same 0")
    shoot(page, "operate-compare")
    with stack.sessions() as session:
        assert session.query(Episode).filter_by(learn=True).count() == before, "it was kept to be learned from"


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_every_page(page, go, stack, release, scheme, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    with stack.sessions() as session:
        canary = session.query(Canary).order_by(Canary.id.desc()).first()
        names = [name for (name,) in session.query(Release.name).limit(2)]
        runs = [f"/operate/runs/{run}" for (run,) in session.query(TrainingRun.id).limit(1)]
        said = [f"/operate/feedback/{episode}" for (episode,) in session.query(Feedback.episode_id).limit(1)]
    paths = [
        "/operate",
        "/operate/releases",
        f"/operate/releases/{names[0]}",
        f"/operate/compare?a={names[0]}&b={names[-1]}",
        f"/operate/rollout/{canary.id}" if canary else "/operate/rollout",
        "/operate/learning",
        "/operate/feedback",
        "/operate/audit",
        *runs,
        *said,
    ]
    for path in paths:
        go(path)
        page.wait_for_timeout(300)
        assert violations(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_a_page_says_when_it_is_not_live_and_catches_up(page, go, stack, problems):
    page.route("**/operate/live", lambda route: route.abort())
    go("/operate")
    expect(page.locator("#live")).to_have_text("not live: trying again")
    page.unroute("**/operate/live")
    expect(page.locator("#live")).to_have_text("live", timeout=10_000)
    assert problems and all("ERR_FAILED" in each for each in problems)
    problems.clear()


def test_a_look_that_failed_is_tried_again(page, go, stack, release, problems):
    go("/operate")
    expect(page.locator("#live")).to_have_text("live")
    failed = []

    def fail_once(route):
        if route.request.resource_type == "fetch" and not failed:
            failed.append(1)
            return route.fulfill(status=503, body="away")
        return route.continue_()

    page.route("**/operate", fail_once)
    with stack.sessions.begin() as session:
        assert autonomy.propose(session, stack.settings, "promote", release, actor="test", reason="a test")
    expect(page.locator(".needs")).to_contain_text(f"Promote {release}?", timeout=10_000)
    expect(page.locator("#live")).to_have_text("live")
    assert failed and "503" in problems.pop()
    (proposal,) = stack.http.get("/v1/proposals").json()
    stack.http.post(f"/v1/proposals/{proposal['id']}/decline", json={"reason": "the test has ended"})
    expect(page.locator(".needs")).to_have_count(0, timeout=10_000)


@pytest.mark.parametrize(
    "address",
    [
        *("/operate/feedback?words=", "/operate/feedback?user=", "/operate/feedback?reason=", "/operate/feedback/"),
        *("/operate/audit?about=", "/operate/audit?by=", "/operate/releases/", "/operate/runs/"),
        *("/operate/compare?a=base&b=", "/operate/learning?csv="),
    ],
)
def test_what_an_address_holds_stays_text(page, go, problems, address):
    go(address + quote(f'">{MARKUP}'))
    assert page.locator("img").count() == 0 and page.locator("b").count() == 0
    assert all("404" in each or "400" in each for each in problems), problems
    problems.clear()


def test_what_is_not_there_is_a_page_that_says_so(page, go, stack, problems):
    go("/operate/releases/nothing-of-that-name")
    expect(page.locator("body")).to_contain_text("There is no release")
    problems.clear()


PAGES = [
    "/",
    "/taught",
    "/memory",
    "/account",
    "/login",
    "/operate/audit",
    "/operate/releases/{0}",
    "/operate/compare?a={0}&b=base",
]


@pytest.mark.parametrize("path", PAGES)
def test_no_button_can_be_pressed_before_the_script_that_answers_it(page, go, stack, release, problems, path):
    page.route("**/*.js", lambda route: route.abort())
    go(path.format(release))
    pressed_for_nothing = page.locator("button:visible:enabled:not([aria-disabled])").evaluate_all(
        "all => all.filter((b) => !b.form?.hasAttribute('action')).map((b) => b.textContent.trim())"
    )
    assert pressed_for_nothing == []
    page.unroute("**/*.js")
    problems.clear()  # that no script came
    go(path.format(release))
    expect(page.locator("main button:visible:enabled").first).to_be_visible()
