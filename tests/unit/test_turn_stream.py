"""A stream of a turn is closed with its client, whenever that leaves."""

import asyncio

from starlette.background import BackgroundTask

from agent.exchange import TurnStream


class Turn:
    """A turn that has begun; its words are never asked for where the client is gone first."""

    is_closed = False

    async def close(self):
        self.is_closed = True


def test_who_leaves_between_the_first_token_and_the_first_event_leaves_a_closed_turn():
    turn = Turn()

    async def words():
        yield "data: Well\n\n"

    async def gone():
        return {"type": "http.disconnect"}

    async def nobody_there(message):
        await asyncio.sleep(60)

    async def nothing():
        pass

    stream = TurnStream(turn, words(), BackgroundTask(nothing))
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, nobody_there))
    assert turn.is_closed
