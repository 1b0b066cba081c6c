"""How the operators' pages write things, and what their door lets through."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from agent.guard import Guard
from deploy.pages import rendering
from deploy.pages.rendering import MAX_SHOWN_ROWS, Chart, Page, Series
from infra.errors import NotFoundError
from infra.settings import Settings


def chart(rows):
    return Chart("some", "Some", "What one sees.", "x", [Series("y")], rows)


@given(st.integers(0, 5000))
def test_a_chart_shows_few_rows_from_the_first_to_the_last(count):
    rows = [(x, x) for x in range(count)]
    shown = chart(rows).shown
    assert len(shown) <= MAX_SHOWN_ROWS + 1 and list(shown) == sorted(set(shown))
    assert not rows or (shown[0], shown[-1]) == (rows[0], rows[-1])


def test_a_csv_has_every_row_and_no_formula():
    at = datetime(2026, 11, 27, tzinfo=UTC)
    rows = [(0, "=HYPERLINK(1)"), (1, "+1"), (2, "plain"), (3, None), (4, at), (5, -1.5)]
    body = Page("none.html", {}, [chart(rows)]).respond(None, "some").body.decode()
    said = ["x,y", "0,'=HYPERLINK(1)", "1,'+1", "2,plain", "3,", "4,2026-11-27T00:00:00+00:00", "5,-1.5"]
    assert body.split("\r\n")[:-1] == said
    with pytest.raises(NotFoundError, match="no chart"):
        Page("none.html", {}, [chart(rows)]).respond(None, "another")


def test_numbers_times_and_shares_are_written_with_units():
    assert rendering.number(1234567) == "1\u202f234\u202f567" and rendering.number(0.012345) == "0.0123"
    assert rendering.number(None) == rendering.percent(None) == rendering.duration(None) == rendering.NOTHING
    assert rendering.percent(0.333, 1) == "33.3\u202f%"
    written = {5: "5\u202fs", 300: "5\u202fmin", 8000: "2\u202fh", 200_000: "2\u202fd"}
    assert {seconds: rendering.duration(seconds) for seconds in written} == written
    east = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert rendering.when(east) == '<time datetime="2025-12-31T23:30:00+00:00">2025-12-31 23:30 UTC</time>'


@pytest.fixture(scope="module")
def door():
    act = Route("/", lambda request: PlainTextResponse("done"), methods=["GET", "POST", "DELETE"])
    app = Starlette(routes=[act])
    app.add_middleware(Guard, settings=Settings(home="/nowhere", max_request_bytes=10))
    return TestClient(app)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_page_elsewhere_cannot_act_here(door, method, site):
    refused = door.request(method, "/", headers={"Sec-Fetch-Site": site})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_site")
    assert door.get("/", headers={"Sec-Fetch-Site": site}).text == "done"  # a link may lead here


@pytest.mark.parametrize("headers", [{}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}])
def test_our_pages_and_programs_can(door, headers):
    assert door.post("/", headers=headers, content=b"x").text == "done"
    assert door.delete("/", headers=headers).text == "done"
