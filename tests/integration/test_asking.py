"""Whose rating is asked for: at most as often as the settings say, and never twice about one answer."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from feedback.tables import Episode
from infra.ids import new_id
from infra.settings import Settings
from infra.tables import OutboxRow
from reward import asking
from reward.learner import Learner
from reward.online import BayesianHead, Score
from reward.tables import Solicitation

START = datetime(2026, 11, 1, 8, tzinfo=UTC)


@pytest.fixture
def session(database):
    with database() as session:  # rolled back
        yield session


def answers(session, user, minutes):
    """Write answers given to somebody at these minutes."""
    session.execute(sa.text("INSERT INTO subject_keys VALUES ('k', '') ON CONFLICT DO NOTHING"))
    session.execute(sa.text("INSERT INTO users VALUES (:u, 'k') ON CONFLICT DO NOTHING"), {"u": user})
    made = [
        Episode(
            **{"id": new_id("ep", at), "created_at": at, "user_id": user, "answer": "Rain."},
            **{"release": "base", "arm": "champion", "propensity": 1.0, "messages": [], "status": "complete"},
            **{"sampling": {}, "token_ids": [], "logprobs": [], "num_prompt_tokens": 1, "latency_ms": 1.0},
            learn=True,
        )
        for at in (START + timedelta(minutes=minute) for minute in minutes)
    ]
    session.add_all(made)
    session.flush()
    return made


def note(session, answers, **more):
    """Have answers noted all of which would teach much; return when whom was asked for ratings, in minutes."""
    learner = Learner(BayesianHead.prior(4))
    settings = Settings(home="/nowhere", **{"ask_share": 0.0, "ask_informative_share": 1.0, **more})
    scores = {answer.id: Score(0.0, 1.0, 0.5) for answer in answers}
    asking.note_answers(session, learner, answers, scores, {a.user_id: a.user_id for a in answers}, settings)
    asked = set(session.scalars(sa.select(Solicitation.episode_id)))
    return [(a.user_id, (a.created_at - START) // timedelta(minutes=1)) for a in answers if a.id in asked]


@pytest.fixture(autouse=True)
def all_would_teach_much(monkeypatch):
    monkeypatch.setattr("reward.learner.Threshold.is_high", lambda self, x: True)


def test_a_person_is_asked_so_often_a_day_and_not_again_at_once(session):
    ada = answers(session, "ada", range(120))
    eve = answers(session, "eve", [3])
    wanted = {"ask_per_day": 4, "ask_gap_s": 900.0}
    asked = note(session, [*ada[:40], *eve], **wanted)
    assert asked == [("ada", 0), ("ada", 15), ("ada", 30), ("eve", 3)]
    assert note(session, ada[40:], **wanted) == [("ada", 45)], "what the batch before asked is not counted"
    later = answers(session, "ada", [24 * 60 - 1, 24 * 60])
    assert note(session, later, **wanted) == [("ada", 24 * 60)]


def test_what_is_asked_at_random_is_not_held_back(session):
    ada = answers(session, "ada", range(5))
    asked = note(session, ada, ask_share=1.0, ask_per_day=0)
    assert len(asked) == 5
    assert set(session.scalars(sa.select(Solicitation.reason))) == {"random"}
    more = answers(session, "ada", [6])
    assert note(session, more, ask_per_day=6) == [], "a rating that was asked for at random does not count"


def test_nobody_is_asked_twice_about_one_answer(session):
    ada = answers(session, "ada", [0])
    for _ in range(2):
        note(session, ada)
    written = sa.select(sa.func.count()).where(OutboxRow.key == ada[0].id)
    assert session.scalar(written) == 1
    assert session.scalar(sa.select(sa.func.count()).select_from(Solicitation)) == 1
