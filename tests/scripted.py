"""A fleet whose model says what a test wrote down: for what is done with its words, not for the words."""

import asyncio
import json
from contextlib import asynccontextmanager

from agent.book import Book
from agent.schema import ChatRequest
from agent.tools.toolbox import Toolbox
from agent.turn import Turn
from infra.settings import Settings


def call(name, **arguments):
    """Return a call as a model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Scripted:
    """A fleet that answers each request with the next of some texts, in pieces of a few characters.

    Parameters
    ----------
    script
        Texts, or functions from the engine's payload to one.
    """

    def __init__(self, *script, piece=3):
        self.script = list(script)
        self.piece = piece
        self.payloads = []
        self.num_open = 0

    async def proved(self, release):
        return {"http://engine": release}

    @asynccontextmanager
    async def stream_chat(self, release, payload, affinity="", routes=None, *, at_once=False):
        self.payloads.append(payload)
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if callable(said):
            said = said(payload)
        if isinstance(said, Exception):
            raise said
        self.num_open += 1
        try:
            yield self._chunks(said)
        finally:
            self.num_open -= 1

    async def _chunks(self, said):
        reason = "stop"
        if isinstance(said, tuple):  # with why it ended
            said, reason = said
        if isinstance(said, list):  # deltas as they are
            pieces = said
        else:
            pieces = [{"content": said[at : at + self.piece]} for at in range(0, len(said), self.piece)]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            choice = {"index": 0, "delta": piece, "token_ids": [number], "finish_reason": reason if last else None}
            choice["logprobs"] = {"content": [{"logprob": -0.5}]}
            yield {"choices": [choice], **({"prompt_token_ids": [1] * 20} if number == 0 else {})}
            await asyncio.sleep(0)


def settings(tmp_path, **changed):
    return Settings(home=tmp_path, engine_url="http://engine", **changed)


@asynccontextmanager
async def world(database, configured, tools=()):
    """The book and the toolbox on a database, for the length of the block."""
    async with (
        Book(database, learn_by_default=True).running() as book,
        Toolbox(configured, database, tools).running() as toolbox,
    ):
        yield book, toolbox


async def turn(book, toolbox, configured, fleet, waited=None, must_end=lambda: False, **body):
    """Have a turn to its end; return it, with the text that was shown and the news of its steps."""
    fields = {
        "model": "everloop",
        "user": "ann",
        "stream": True,
        "messages": [{"role": "user", "content": "Well?"}],
    }
    request = ChatRequest.model_validate({**fields, **body})
    one = Turn(book, fleet, configured, request, must_end, toolbox=toolbox, waited=waited)
    await one.begin()
    said, news = "", []
    async for piece in one.deltas():
        news += json.loads(json.dumps(one.take_news()))
        said += piece
    return one, said, news
