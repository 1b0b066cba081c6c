"""What pages are told of changes: once for all who listen, and nothing is missed from the first moment on."""

import asyncio

import pytest

from deploy import autonomy
from deploy.pages import live
from deploy.pages.live import Pulse


@pytest.fixture
def looks(monkeypatch):
    """How often the database was asked; a look comes every 50 ms."""
    asked = []
    read = live._read
    monkeypatch.setattr(live, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(live, "_read", lambda sessions: asked.append(1) or read(sessions))
    return asked


def set_autonomy(database, settings, level):
    with database.begin() as session:
        autonomy.set_level(session, settings, level, actor="test", reason="a test")


async def next_change(queue):
    while not (changed := await asyncio.wait_for(queue.get(), timeout=5)):
        pass
    return changed


def test_all_who_listen_hear_of_a_change_from_one_look_and_nobody_looks_for_nobody(database, settings, looks):
    async def run():
        pulse = Pulse(database)
        async with pulse.listen() as one, pulse.listen() as other:
            await asyncio.to_thread(set_autonomy, database, settings, "observe")
            assert await next_change(one) == await next_change(other) == ["deployment"]
            before = len(looks)
            await asyncio.sleep(0.5)
            assert len(looks) - before <= 11, "each listener looked by itself"
        await asyncio.sleep(0.2)
        before = len(looks)
        await asyncio.sleep(0.3)
        assert len(looks) == before
        async with pulse.listen() as late:  # it begins again
            await asyncio.to_thread(set_autonomy, database, settings, "auto")
            assert await next_change(late) == ["deployment"]

    asyncio.run(run())


def test_a_stream_ends_when_the_server_stops(database, looks):
    stopping = False

    async def run():
        nonlocal stopping
        events = live._events(Pulse(database), lambda: stopping)
        assert "event: ready" in await anext(events)
        stopping = True
        assert [event async for event in events] == []

    asyncio.run(run())


def test_a_database_that_is_away_is_no_change(database, settings, looks, monkeypatch):
    async def run():
        pulse = Pulse(database)
        async with pulse.listen() as queue:
            with monkeypatch.context() as patch:
                patch.setattr(live, "_read", lambda sessions: {})
                assert await asyncio.wait_for(queue.get(), timeout=5) == []
                await asyncio.to_thread(set_autonomy, database, settings, "observe")
            assert await next_change(queue) == ["deployment"]

    asyncio.run(run())
