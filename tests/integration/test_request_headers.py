"""The headers that clients of OpenAI's API look for."""

import pytest
from fastapi.testclient import TestClient

from infra.access import gate
from tests.integration.test_access import House


@pytest.fixture
def house(database, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "KNOWN_FOR_S", 0.0)
    house = House(database, tmp_path, requests_per_minute=5, tokens_per_hour=1000)
    with TestClient(house.app):
        yield house


def test_each_request_has_its_own_name_and_its_time(house):
    program, _ = house.program(house.account("ann"))
    found = [program.get("/v1/conversations").headers for _ in range(2)]
    assert len({headers["x-request-id"] for headers in found}) == 2
    assert all(headers["x-request-id"].startswith("req_") for headers in found)
    assert all(int(headers["openai-processing-ms"]) >= 0 for headers in found)
    assert "x-request-id" in house.stranger().get("/v1/nothing").headers
    assert "x-request-id" not in house.stranger().get("/healthz").headers


def test_who_is_limited_is_told_what_is_left(house):
    program, _ = house.program(house.account("ann"))
    for left in (4, 3):
        headers = program.post("/v1/conversations", json={}).headers
        assert headers["x-ratelimit-limit-requests"] == "5"
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert 0 <= int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert headers["x-ratelimit-limit-tokens"] == headers["x-ratelimit-remaining-tokens"] == "1000"
    other, _ = house.program(house.account("ben"))
    assert other.post("/v1/conversations", json={}).headers["x-ratelimit-remaining-requests"] == "4"
