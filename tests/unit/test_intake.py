"""The intake: together under load, and one bad request costs only itself."""

import asyncio

import pytest

from feedback import intake
from feedback.acceptance import Accepted
from feedback.intake import Intake
from feedback.signals import read_signal
from infra import together
from infra.errors import EverloopError, UnavailableError


def signal(number, user="u"):
    return read_signal.validate_python(
        {"episode_id": "ep", "user": user, "kind": "thumb", "value": 1, "idempotency_key": str(number)}
    )


class Database:
    """Stands where the transaction would, and remembers what was written together."""

    def __init__(self, monkeypatch):
        self.together = []
        self.away = False
        monkeypatch.setattr(together, "transaction", lambda sessions: self)
        monkeypatch.setattr(intake, "accept_many", self.accept_many)

    def __enter__(self):
        if self.away:
            raise UnavailableError("away", code="database_unavailable")
        return self

    def __exit__(self, *_):
        return False

    def accept_many(self, session, signals):
        if any(s.user == "poison" for s in signals):
            raise ZeroDivisionError
        self.together.append(len(signals))
        return [Accepted(id=s.idempotency_key, episode_id="ep", kind="thumb", repeated=False) for s in signals]


@pytest.fixture
def database(monkeypatch):
    return Database(monkeypatch)


def run(work):
    async def inside():
        async with Intake(None).running() as running:
            return await work(running)

    return asyncio.run(inside())


def test_what_arrives_together_is_written_together_and_answered_in_its_order(database):
    async def work(running):
        return await asyncio.gather(*(running.give([signal(n)]) for n in range(50)))

    answers = run(work)
    assert [answer[0].id for answer in answers] == [str(n) for n in range(50)]
    assert sum(database.together) == 50 and len(database.together) < 10


def test_a_request_that_breaks_the_transaction_does_not_break_its_neighbours(database):
    async def work(running):
        gifts = [[signal(n, "poison" if n == 7 else "u")] for n in range(20)]
        return await asyncio.gather(*(running.give(gift) for gift in gifts))

    answers = run(work)
    assert [n for n, answer in enumerate(answers) if isinstance(answer[0], EverloopError)] == [7]
    assert answers[7][0].code == "internal_error"


def test_with_the_database_away_everybody_is_told_and_the_intake_goes_on(database):
    async def work(running):
        database.away = True
        refused = await asyncio.gather(*(running.give([signal(n)]) for n in range(5)), return_exceptions=True)
        database.away = False
        return refused, await running.give([signal(9)])

    refused, accepted = run(work)
    assert {error.code for error in refused} == {"database_unavailable"} and accepted[0].id == "9"


def test_too_many_waiting_are_refused_at_once(database, monkeypatch):
    monkeypatch.setattr(together, "MAX_WAITING", 3)

    async def work(running):
        return await asyncio.gather(*(running.give([signal(n)]) for n in range(6)), return_exceptions=True)

    answers = run(work)
    assert [getattr(answer, "code", None) for answer in answers] == [None] * 3 + ["overloaded"] * 3
