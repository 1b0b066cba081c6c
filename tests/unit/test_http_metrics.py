"""Requests as metrics: by template and class of status, whatever becomes of them."""

import asyncio

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY

from infra.telemetry.http import Observed


@pytest.fixture
def app():
    router = APIRouter(prefix="/v1")

    @router.get("/things/{name}")
    async def thing(name: str):
        if name == "broken":
            raise RuntimeError("what somebody said")
        return {"name": name}

    @router.get("/stream")
    async def stream():
        async def pieces():
            for _ in range(3):
                yield b"x"
                await asyncio.sleep(0.02)

        return StreamingResponse(pieces())

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Observed)
    return app


def value(name, **labels):
    return REGISTRY.get_sample_value(f"everloop_http_{name}", labels) or 0.0


def get(app, *paths, method="GET"):
    async def all_of_them():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.request(method, path)).status_code for path in paths]

    return asyncio.run(all_of_them())


def test_paths_of_one_template_are_one_series(app):
    labels = {"method": "GET", "route": "/v1/things/{name}", "status": "2xx"}
    before = value("requests_total", **labels)
    assert get(app, "/v1/things/a", "/v1/things/b", "/v1/things/c") == [200] * 3
    assert value("requests_total", **labels) == before + 3
    assert value("requests_in_flight") == 0


def test_what_breaks_is_a_5xx_and_no_longer_in_flight(app):
    labels = {"method": "GET", "route": "/v1/things/{name}", "status": "5xx"}
    before = value("requests_total", **labels)
    get(app, "/v1/things/broken")
    assert value("requests_total", **labels) == before + 1 and value("requests_in_flight") == 0


def test_what_anybody_may_make_up_makes_no_series_of_its_own(app):
    unmatched = {"method": "GET", "route": "unmatched", "status": "4xx"}
    other = {"method": "other", "route": "unmatched", "status": "4xx"}
    before = value("requests_total", **unmatched), value("requests_total", **other)
    get(app, "/a", "/b", "/v1/nothing")
    get(app, "/a", method="BREW")
    assert value("requests_total", **unmatched) == before[0] + 3
    assert value("requests_total", **other) == before[1] + 1


def test_a_stream_is_measured_to_its_last_byte(app):
    labels = {"method": "GET", "route": "/v1/stream"}
    before = value("request_duration_seconds_sum", **labels)
    get(app, "/v1/stream")
    assert value("request_duration_seconds_sum", **labels) - before >= 0.04


def test_who_hangs_up_before_an_answer_is_told_as_such(app):
    labels = {"method": "GET", "route": "unmatched", "status": "4xx"}
    before = value("requests_total", **labels)

    async def hang_up(scope, receive, send):
        raise asyncio.CancelledError

    async def run():
        with pytest.raises(asyncio.CancelledError):
            await Observed(hang_up)({"type": "http", "method": "GET", "path": "/"}, None, None)

    asyncio.run(run())
    assert value("requests_total", **labels) == before + 1 and value("requests_in_flight") == 0
