"""Signals from HTTP through Kafka to a changed score."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from feedback.tables import Feedback
from infra.tables import OutboxRow
from tests.conftest import wait_until


@pytest.fixture(scope="module")
def answered(stack):
    return stack.ask("What is rain?", max_tokens=24).id


def score(stack, episode_id):
    return stack.http.get(f"/v1/episodes/{episode_id}").json()["score"]


def test_a_new_answer_is_scored_with_its_uncertainty(stack):
    episode_id = stack.ask("What is snow?").id
    belief = wait_until(lambda: score(stack, episode_id), what="the answer was not scored")
    assert 0 < belief["p_good"] < 1 and belief["sd"] > 0


def test_a_thumb_moves_the_score_a_withdrawal_moves_it_back(stack):
    episode_id = stack.ask("What is hail?").id
    before = wait_until(lambda: score(stack, episode_id))
    assert stack.feedback(episode_id, kind="thumb", value=-1).status_code == 202
    down = wait_until(lambda: (s := score(stack, episode_id)) and s["mean"] < before["mean"] and s)
    assert stack.feedback(episode_id, kind="thumb", value=1).status_code == 202
    up = wait_until(lambda: (s := score(stack, episode_id)) and s["mean"] > before["mean"] and s)
    # Not against what was before: the calibration learned from both votes, and from everybody else's.
    assert up["p_good"] > down["p_good"]
    assert stack.feedback(episode_id, kind="thumb", value=0).status_code == 202
    wait_until(lambda: score(stack, episode_id)["mean"] == pytest.approx(before["mean"], abs=1e-6))
    assert stack.http.get(f"/v1/episodes/{episode_id}").json()["feedback"] == []


def test_a_correction_lowers_what_it_corrects(stack):
    episode_id = stack.ask("What is fog?", max_tokens=48).id
    before = wait_until(lambda: score(stack, episode_id))
    assert stack.feedback(episode_id, kind="correction", text="Fog is a cloud on the ground.").status_code == 202
    wait_until(lambda: score(stack, episode_id)["update_seq"] > before["update_seq"])
    assert score(stack, episode_id)["mean"] < before["mean"]


def test_an_answer_that_may_not_be_learned_from_has_no_score(stack):
    kept_out = stack.ask("What is dew?", store=False).id
    learned = stack.ask("What is ice?").id
    wait_until(lambda: score(stack, learned))
    assert score(stack, kept_out) is None


def test_a_retry_gets_the_first_receipt_and_another_body_a_conflict(stack, answered):
    key = uuid.uuid4().hex
    first = stack.feedback(answered, kind="thumb", value=1, idempotency_key=key)
    again = stack.feedback(answered, kind="thumb", value=1, idempotency_key=key)
    other = stack.feedback(answered, kind="thumb", value=-1, idempotency_key=key)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"] and again.json()["repeated"]
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"


def test_the_same_signal_many_times_at_once_is_one_row_and_one_event(stack, answered):
    key = uuid.uuid4().hex
    with ThreadPoolExecutor(8) as pool:
        replies = list(
            pool.map(lambda _: stack.feedback(answered, kind="thumb", value=1, idempotency_key=key), range(16))
        )
    ids = {reply.json()["id"] for reply in replies}
    assert {reply.status_code for reply in replies} == {202} and len(ids) == 1
    with stack.sessions() as session:
        assert session.query(Feedback).filter_by(idempotency_key=key).count() == 1
        events = session.query(OutboxRow).filter(OutboxRow.event_id == ids.pop()).all()
    assert [event.topic for event in events].count("everloop.feedback") == 1


@pytest.mark.parametrize(
    ("signal", "status", "code"),
    [
        ({"episode_id": "ep_nope", "kind": "thumb", "value": 1}, 404, "episode_not_found"),
        ({"kind": "thumb", "value": 5}, 400, "invalid_request"),
        ({"kind": "thumb"}, 400, "invalid_request"),
        ({"kind": "correction", "text": "x" * 20_000}, 400, "invalid_request"),
        ({"kind": "correction", "text": "  "}, 400, "invalid_request"),
        ({"kind": "applause", "value": 1}, 400, "invalid_request"),
    ],
)
def test_bad_signals_are_refused_and_write_nothing(stack, answered, signal, status, code):
    def count():
        with stack.sessions() as session:
            return session.query(Feedback).count()

    before = count()
    response = stack.feedback(signal.pop("episode_id", answered), **signal)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert count() == before


def test_an_unknown_episode_answers_404(stack):
    assert stack.http.get("/v1/episodes/%00").status_code == 400
    response = stack.http.get("/v1/episodes/ep_nope")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "episode_not_found")
