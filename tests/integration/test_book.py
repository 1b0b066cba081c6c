"""Turns that begin and end together in the database: each gets its own, and nobody waits for another's erasure."""

import asyncio

import pytest
import sqlalchemy as sa

from agent.book import Asked, Book
from agent.schema import ChatRequest
from agent.turn import Turn
from deploy import head
from deploy.tables import Release
from feedback import episodes, erasure
from feedback.episodes import Recording
from feedback.tables import Episode, User
from infra.errors import EverloopError, InvalidRequestError, NotFoundError, UnavailableError
from infra.fleet import Fleet
from infra.settings import Settings
from infra.tables import OutboxRow
from tests.adapters import CANARY


def run(database, work):
    async def inside():
        async with Book(database, learn_by_default=True).running() as book:
            return await work(book)

    return asyncio.run(asyncio.wait_for(inside(), 30))


def recording(user, begun, answer="Because."):
    fields = {"episode_id": episodes.new_episode_id(), "user_id": user, "release": begun.assignment.release}
    fields |= {"adapter_digest": None, "canary_id": begun.assignment.canary_id, "arm": begun.assignment.arm}
    fields |= {"propensity": begun.assignment.propensity, "messages": [], "sampling": {}, "learn": begun.may_learn}
    return Recording(**fields, answer=answer, status="complete", latency_ms=1.0)


def test_many_turns_at_once_are_each_an_episode_and_an_event(database):
    async def work(book):
        async def turn(number):
            user = f"user-{number % 7}"
            begun = await book.begin(Asked(user, "everloop"))
            assert begun.assignment.release == "base" and begun.may_learn
            return await book.end(recording(user, begun), begun.key)

        return await asyncio.gather(*(turn(number) for number in range(60)))

    assert run(database, work) == [True] * 60
    with database() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Episode)) == 60
        assert session.scalar(sa.select(sa.func.count()).select_from(User)) == 7
        assert session.scalar(sa.select(sa.func.count()).select_from(OutboxRow)) == 60


def test_each_gets_their_own_answer_or_their_own_refusal(database):
    with database.begin() as session:
        session.add(Release(name="r1"))
        session.flush()
        opened = head.open_canary(session, challenger="r1", **CANARY)
    asked = [Asked(f"user-{number}", "everloop") for number in range(20)]
    asked += [
        Asked("ann", "r1"),
        Asked("ann", "r9"),
        Asked("forgotten_x", "everloop"),
        Asked("ann", "x", "run/x@1"),
    ]

    async def work(book):
        return await asyncio.gather(*(book.begin(one) for one in asked), return_exceptions=True)

    found = run(database, work)
    for one, begun in zip(asked[:20], found[:20], strict=True):
        arm = "challenger" if head.unit_interval(opened.id, one.user) < 0.5 else "champion"
        assert (begun.assignment.arm, begun.assignment.propensity) == (arm, 0.5)
        assert begun.assignment.release == {"challenger": "r1", "champion": "base"}[arm]
    assert {begun.assignment.arm for begun in found[:20]} == {"challenger", "champion"}
    pinned, unknown, reserved, trial = found[20:]
    assert (pinned.assignment.release, pinned.assignment.arm) == ("r1", "pinned")
    assert isinstance(unknown, NotFoundError) and unknown.code == "model_not_found"
    assert isinstance(reserved, InvalidRequestError) and reserved.code == "user_reserved"
    assert trial.assignment.release == "run/x@1"


def test_who_is_being_forgotten_keeps_nobody_waiting_and_begins_anew(database):
    async def work(book):
        begun = {user: await book.begin(Asked(user, "everloop")) for user in ("ann", "ben")}
        with database.begin() as session:
            erasure.forget(session, "ann", "retrain-required")  # holds its rows until the block ends
            again = asyncio.create_task(book.begin(Asked("ann", "everloop")))
            ending = asyncio.create_task(book.end(recording("ann", begun["ann"]), begun["ann"].key))
            others = [
                book.begin(Asked("ben", "everloop")),
                book.end(recording("ben", begun["ben"]), begun["ben"].key),
            ]
            assert (await asyncio.wait_for(asyncio.gather(*others), 5))[1] is True
            assert not again.done() and not ending.done()
        return begun["ann"], await again, await ending

    before, again, ended = run(database, work)
    assert again.key.key_id != before.key.key_id and ended is False
    with database() as session:
        assert session.scalars(sa.select(Episode.user_id)).all() == ["ben"]


def test_what_one_cannot_write_harms_no_other(database):
    async def work(book):
        begun = await book.begin(Asked("ann", "everloop"))
        endings = [book.end(recording("ann", begun, "bad\x00" if n == 3 else "good"), begun.key) for n in range(8)]
        return await asyncio.gather(*endings, return_exceptions=True)

    found = run(database, work)
    assert [n for n, outcome in enumerate(found) if isinstance(outcome, EverloopError)] == [3]
    with database() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Episode)) == 7


@pytest.mark.parametrize("said", [True, False])
def test_what_a_user_said_of_being_learned_from_holds(database, said):
    async def work(book):
        await book.begin(Asked("ann", "everloop"))
        with database.begin() as session:
            session.execute(sa.update(User).values(learn=said))
        return await book.begin(Asked("ann", "everloop"))

    assert run(database, work).may_learn is said


def test_who_meets_an_arm_that_cannot_answer_counts_for_it(database, tmp_path):
    with database.begin() as session:
        session.add(Release(name="r1"))
        session.flush()
        head.open_canary(session, challenger="r1", **CANARY)
    settings = Settings(home=tmp_path, engine_url="http://127.0.0.1:9")

    async def work(book):
        body = ChatRequest(model="everloop", messages=[{"role": "user", "content": "Why?"}], user="ann")
        async with Fleet(settings, lambda release: {}).running() as fleet:
            await Turn(book, fleet, settings, body).begin()

    with pytest.raises(UnavailableError):
        run(database, work)
    with database() as session:
        (episode,) = session.scalars(sa.select(Episode)).all()
    assert (episode.status, episode.user_id, episode.answer) == ("failed", "ann", "") and episode.canary_id
