"""The reward model on the running stack: scores of any answer, gold probes, bans, learning anew."""

import time
import uuid
from datetime import UTC, datetime

import numpy as np
import pytest
import sqlalchemy as sa

from feedback.tables import Episode, User
from infra.db import transaction
from infra.events import RebuildRequested
from infra.ids import new_id
from infra.log import outbox
from infra.tables import ConsumedEvent, DeadLetter
from reward import asking, decisions, history, state, store
from reward.encoder import open_encoder
from reward.learner import Learner
from reward.online import BayesianHead, Score
from reward.tables import GoldProbe, RatingChoice, RewardSnapshot, RewardUpdate
from tests.conftest import wait_until

ANSWER = "Rain is water that falls from clouds. It forms when vapour cools."
QUESTION = [{"role": "user", "content": "What is rain?"}]


def score(stack, *items, **more):
    body = {"items": [{"messages": QUESTION, **item} for item in items], **more}
    return stack.http.post("/v1/rewards/score", json=body)


def latest(stack, feedback_ids):
    encoder = open_encoder(stack.settings).name
    with stack.sessions() as session:
        return {name: c.action for name, c in history.latest_of(session, encoder, feedback_ids).items()}


def vote(stack, user, value=1, count=1):
    ids = []
    for n in range(count):
        episode = stack.ask(f"What is the number {n}?", user=user, max_tokens=8).id
        ids.append((episode, stack.feedback(episode, user=user, kind="thumb", value=value).json()["id"]))
    wait_until(lambda: len(latest(stack, [f for _, f in ids])) == count, what="the votes did not arrive")
    return ids


def rule(stack, user, ruling):
    with transaction(stack.sessions) as session:
        key = session.get_one(User, user).key_id
        return decisions.give_ruling(session, rater=key, ruling=ruling, operator="test", reason="a test")


def test_scores_name_their_version_and_what_they_are_made_of(stack):
    wait_until(lambda: score(stack, {"answer": ANSWER}).status_code != 503, what="the worker did not come up")
    answer = score(stack, {"answer": ANSWER}, {"answer": ANSWER, "reference": ANSWER}, {"answer": "No."})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["encoder"] == open_encoder(stack.settings).name
    for row in body["data"]:
        assert set(row["contributions"]) == {"content", "prompt", "style", "constant"}
        assert sum(row["contributions"].values()) == pytest.approx(row["mean"], abs=1e-9)
        expected = max(-8.0, min(8.0, row["mean"] - body["kappa"] * row["sd"]))
        assert row["reward"] == pytest.approx(expected) and 0 < row["p_good"] < 1
    same = body["data"][1]  # against itself: nothing to choose, but for rounding within a batch of bfloat16
    assert abs(same["mean"]) < 0.1 and same["sd"] < 0.1 and abs(same["p_good"] - 0.5) < 0.05


def test_a_pinned_snapshot_scores_the_same_after_more_was_learned(stack):
    vote(stack, "pinner")
    encoder = open_encoder(stack.settings)
    with stack.sessions.begin() as session:
        pinned, _ = store.pin_snapshot(session, encoder.name, encoder.dim)
    first = score(stack, {"answer": ANSWER}, snapshot_id=pinned).json()
    vote(stack, "pinner", value=-1, count=3)
    again = score(stack, {"answer": ANSWER}, snapshot_id=pinned).json()
    assert first["data"][0]["mean"] == again["data"][0]["mean"] and first["update_seq"] == again["update_seq"]
    assert score(stack, {"answer": ANSWER}).json()["update_seq"] > again["update_seq"]


@pytest.mark.parametrize(
    ("item", "status", "code"),
    [
        ({"answer": "  "}, 400, "answer_empty"),
        ({"answer": "word " * 30_000}, 400, "answer_too_long"),
        ({"answer": ANSWER, "extra": 1}, 400, "invalid_request"),
    ],
)
def test_what_cannot_be_scored_is_refused(stack, item, status, code):
    answer = score(stack, item)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_an_unknown_snapshot_is_a_404(stack):
    answer = score(stack, {"answer": ANSWER}, snapshot_id=999_999)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "snapshot_not_found")


def test_a_snapshot_that_was_altered_is_refused(stack):
    vote(stack, "snapper")
    encoder = open_encoder(stack.settings)
    with stack.sessions.begin() as session:
        pinned, _ = store.pin_snapshot(session, encoder.name, encoder.dim)
        row = session.get_one(RewardSnapshot, pinned)
        kept, row.theta = row.theta, row.theta[:-8] + b"\x00" * 8
    try:
        answer = score(stack, {"answer": ANSWER}, snapshot_id=pinned)
        assert answer.json()["error"]["code"] == "reward_snapshot_corrupt"
    finally:
        with stack.sessions.begin() as session:
            session.get_one(RewardSnapshot, pinned).theta = kept


def test_a_banned_rater_is_out_within_a_second_and_back_when_reinstated(stack):
    user = f"banned-{uuid.uuid4().hex}"
    said = [feedback for _, feedback in vote(stack, user, value=-1, count=6)]
    started_s = time.monotonic()
    rule(stack, user, "banned")
    wait_until(lambda: set(latest(stack, said).values()) == {"hold"}, what="the ban had no effect")
    took_s = time.monotonic() - started_s
    receipt = wait_until(
        lambda: (
            (r := stack.http.get(f"/v1/feedback/{said[0]}/receipt", headers={"X-Everloop-User": user}).json())[
                "status"
            ]
            == "set_aside"
            and r
        )
    )
    assert receipt["reason"] == "rater_banned"
    rule(stack, user, None)
    wait_until(lambda: set(latest(stack, said).values()) == {"add"}, what="the votes did not come back")
    assert took_s < 10.0  # it is a second on a quiet machine


def test_a_program_that_bears_a_persons_name_is_somebody_else(stack):
    user = f"namesake-{uuid.uuid4().hex}"
    [(episode, thumb)] = vote(stack, user)
    judged = stack.feedback(episode, user=user, kind="judge", score=0.9).json()["id"]
    wait_until(lambda: judged in latest(stack, [judged]), what="the judge was not heard")
    rule(stack, user, "banned")
    wait_until(lambda: latest(stack, [thumb]) == {thumb: "hold"}, what="the ban had no effect")
    assert latest(stack, [judged]) == {judged: "add"}


def test_who_does_not_count_has_no_say_in_what_a_kind_is_worth(stack):
    def compared():
        with stack.sessions() as session:
            return state.read_guards(session, encoder).kinds.report()["verifier"]["compared"]

    encoder, user = open_encoder(stack.settings).name, f"unheard-{uuid.uuid4().hex}"
    [(episode, thumb)] = vote(stack, user)
    before = compared()
    verified = stack.feedback(episode, user="some-tests", kind="verifier", value=1).json()["id"]
    wait_until(lambda: verified in latest(stack, [verified]), what="the verifier was not heard")
    assert compared() == before + 1
    rule(stack, user, "banned")
    wait_until(lambda: latest(stack, [thumb]) == {thumb: "hold"}, what="the ban had no effect")
    others = [stack.ask(f"Name colour {n}.", user=user, max_tokens=8).id for n in range(2)]
    sent = [
        stack.feedback(others[0], user=user, kind="thumb", value=-1),
        stack.feedback(others[0], user="some-tests", kind="verifier", value=1),
        stack.feedback(others[1], user="some-tests", kind="verifier", value=1),
        stack.feedback(others[1], user=user, kind="thumb", value=-1),
    ]
    ids = [answer.json()["id"] for answer in sent]
    wait_until(lambda: len(latest(stack, ids)) == len(ids), what="they were not heard")
    assert compared() == before + 1
    rule(stack, user, None)


def test_a_rater_who_is_wrong_on_gold_probes_no_longer_counts(stack):
    user = f"wrong-{uuid.uuid4().hex}"
    votes = vote(stack, user, value=-1, count=6)
    for episode, _ in votes:
        with transaction(stack.sessions) as session:
            decisions.give_probe(session, episode, good=True, operator="test", reason="a test")
    said = [feedback for _, feedback in votes]
    wait_until(lambda: set(latest(stack, said).values()) == {"hold"}, what="the probes had no effect")
    wait_until(lambda: all(judged(stack, episode) for episode, _ in votes), what="probes were not learned from")


def judged(stack, episode):
    with stack.sessions() as session:
        return session.scalar(sa.select(GoldProbe.judged).where(GoldProbe.episode_id == episode))


def test_a_correction_too_long_to_read_becomes_a_dead_letter_and_nothing_else(stack):
    episode = stack.ask("What is a novel?", max_tokens=8).id
    with stack.sessions() as session:
        before = history.last_seq(session)
    text = "\U0001f600" * 9_000  # one character, several tokens
    given = stack.feedback(episode, kind="correction", text=text)
    assert given.status_code == 202, given.text

    def dead():
        with stack.sessions() as session:
            return session.scalar(
                sa.select(sa.func.count())
                .select_from(DeadLetter)
                .where(DeadLetter.event_id == given.json()["id"], DeadLetter.consumer == "reward")
            )

    wait_until(dead, what="it did not become a dead letter")
    with stack.sessions() as session:
        assert not session.scalars(
            sa.select(RewardUpdate).where(RewardUpdate.feedback_id == given.json()["id"])
        ).all()
        assert history.last_seq(session) == before


def test_learning_anew_ends_where_learning_ended(stack):
    vote(stack, "rebuilt", count=3)
    encoder = open_encoder(stack.settings)
    with stack.sessions() as session:
        learner, before = state.load(session, encoder.name, encoder.dim)
    event_id = new_id("rb")
    with transaction(stack.sessions) as session:
        event = RebuildRequested(encoder=encoder.name, reason="a test")
        outbox.append(session, event, key=encoder.name, event_id=event_id)

    consumed = sa.select(ConsumedEvent.dead_letter).where(
        ConsumedEvent.event_id == event_id, ConsumedEvent.consumer == "reward"
    )

    def done():
        with stack.sessions() as session:
            return session.scalar(consumed) is not None

    wait_until(done, timeout_s=60, what="it was not rebuilt")
    with stack.sessions() as session:
        assert not session.scalar(consumed)
        again, after = state.load(session, encoder.name, encoder.dim)
    assert after.update_seq > before.update_seq
    # What kinds weigh and how far raters are trusted is learned anew too, so that a signal may weigh otherwise, or
    # be held now that was not; and withdrawn votes were never in, so that sites stand at other points: near, not
    # equal (.947 after one whole test run).
    assert abs(after.num_signals - before.num_signals) <= 0.05 * before.num_signals + 1
    x = np.random.default_rng(0).normal(size=(50, encoder.dim)) * 0.2
    old, new = ([s.mean for s in some.head.predict_many(x)] for some in (learner, again))
    assert np.corrcoef(old, new)[0, 1] > 0.9


def test_who_rates_is_learned_at_one_age_from_those_who_did_and_those_who_did_not(stack):
    learner = Learner(BayesianHead.prior(4))
    early, late = (
        [
            Episode(id=f"z{n:04d}", user_id="ada", answer="Rain.", created_at=datetime.now(UTC))
            for n in range(start, start + asking.OPEN_ANSWERS)
        ]
        for start in (0, asking.OPEN_ANSWERS)
    )

    def note(session, answers):
        scores = {answer.id: Score(0.0, 1.0, 0.5) for answer in answers}
        asking.note_answers(session, learner, answers, scores, {"ada": "key"}, stack.settings)

    with stack.sessions() as session:  # rolled back
        session.execute(sa.update(RatingChoice).where(RatingChoice.rated.is_(None)).values(rated=False))
        note(session, early)
        for answer in (*early[:10], early[0]):
            choice = session.get_one(RatingChoice, answer.id)
            asking.note_rating(learner, choice, "key", 1.0, asked_at_random=False)
        known = learner.guards.propensity
        assert known.num_seen == 0, "a rating is learned before it is known who did not rate"
        assert learner.raters.get("key").num_rated == 10
        note(session, late[:-1])
        assert (known.num_seen, known.num_rated) == (asking.OPEN_ANSWERS - 1, 10)
        asking.note_rating(learner, session.get_one(RatingChoice, early[20].id), "key", 1.0, asked_at_random=False)
        note(session, late[-1:])
        assert (known.num_seen, known.num_rated) == (asking.OPEN_ANSWERS, 10), "late ratings do not change it"
