"""The engine's client against a stream that was recorded byte by byte."""

import asyncio
import json

import httpx
import pytest

from infra.engine import EngineClient

# All that Python calls the end of a line, and JSON may hold as it is.
ODD = "one\u2028two\u2029three\x85four"


class Pieces(httpx.AsyncByteStream):
    """Sends a body in pieces of some size."""

    def __init__(self, body, size):
        self.body, self.size = body, size

    async def __aiter__(self):
        for start in range(0, len(self.body), self.size):
            yield self.body[start : start + self.size]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_may_hold_any_character(newline, size):
    events = [{"choices": [{"delta": {"content": text}}]} for text in (ODD, "", "end")]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}" for event in events]
    body = "".join(line + 2 * newline for line in [*lines, "data: [DONE]"]).encode()

    async def ask():
        async with EngineClient("http://engine") as client:
            respond = httpx.MockTransport(lambda _: httpx.Response(200, stream=Pieces(body, size)))
            client._http = httpx.AsyncClient(base_url="http://engine", transport=respond)
            async with client.stream_chat({"messages": []}) as stream:
                return [event async for event in stream]

    assert asyncio.run(ask()) == events
