"""What became of a signal, and that it can be rebuilt from the log."""

import subprocess
import uuid

import pytest
import sqlalchemy as sa

from feedback.tables import Episode, ReceiptFate, ReceiptRow, ReceiptRun, ReceiptUse
from tests.conftest import EVERLOOP, wait_until

PROJECTION = (ReceiptRow, ReceiptUse, ReceiptRun, ReceiptFate)


def receipt(stack, feedback_id, user="tester"):
    return stack.http.get(f"/v1/feedback/{feedback_id}/receipt", headers={"X-Everloop-User": user})


def status(stack, feedback_id, wanted):
    def reached():
        found = receipt(stack, feedback_id).json()
        return found if found["status"] == wanted else None

    return wait_until(reached, timeout_s=30, what=f"the receipt did not become {wanted}")


def test_a_thumb_is_learned_from_and_the_receipt_says_what_it_did(stack):
    episode_id = stack.ask("What is a lake?", max_tokens=24).id
    feedback_id = stack.feedback(episode_id, kind="thumb", value=-1).json()["id"]
    assert receipt(stack, feedback_id).json()["status"] in ("accepted", "learned"), "there is a receipt at once"
    found = status(stack, feedback_id, "learned")
    assert 0 < found["reward"]["p_after"] < found["reward"]["p_before"] < 1 and found["reward"]["update_seq"] > 0
    assert found["training"] == [] and "moved the belief" in found["summary"]


def test_what_is_set_aside_says_why(stack):
    episode_id = stack.ask("What is a pond?", store=False).id
    silent = stack.feedback(episode_id, kind="thumb", value=1).json()["id"]
    assert status(stack, silent, "set_aside")["reason"] == "no_consent"
    comment = stack.feedback(stack.ask("What is a sea?").id, kind="comment", text="Good.").json()["id"]
    assert status(stack, comment, "set_aside")["reason"] == "kind_not_learned"


def test_a_change_of_mind_and_a_withdrawal_show(stack):
    episode_id = stack.ask("What is a bay?").id
    first, second, third = (stack.feedback(episode_id, kind="thumb", value=v).json()["id"] for v in (1, -1, 0))
    assert receipt(stack, first).json()["reason"] == third
    assert [receipt(stack, f).json()["status"] for f in (first, second, third)] == [
        "superseded",
        "superseded",
        "withdrawn",
    ]


def test_a_receipt_is_only_for_the_one_who_gave_the_signal(stack):
    feedback_id = stack.feedback(stack.ask("What is a fjord?").id, kind="thumb", value=1).json()["id"]
    strange, unknown = receipt(stack, feedback_id, "stranger"), receipt(stack, "fb_nope", "stranger")
    assert strange.status_code == unknown.status_code == 404
    assert strange.json()["error"]["code"] == "feedback_not_found"
    assert strange.text.replace(feedback_id, "fb_nope") == unknown.text


def test_pages_of_receipts_hold_each_signal_once_newest_first(stack):
    user = f"pager-{uuid.uuid4().hex}"
    episode_id = stack.ask("What is a brook?", user=user).id
    given = [stack.feedback(episode_id, kind="rating", value=1 + n % 5, user=user).json()["id"] for n in range(7)]
    seen, before = [], None
    while True:
        query = {"limit": 3} | ({"before": before} if before else {})
        page = stack.http.get("/v1/me/receipts", params=query, headers={"X-Everloop-User": user}).json()
        seen += [row["id"] for row in page["data"]]
        before = page["next_before"]
        if before is None:
            break
    assert seen == given[::-1]


def test_the_projection_rebuilt_from_the_log_is_the_same(stack):
    feedback_id = stack.feedback(stack.ask("What is a delta?").id, kind="thumb", value=1).json()["id"]
    status(stack, feedback_id, "learned")

    def contents():
        with stack.sessions() as session:
            return [
                sorted(map(tuple, session.execute(sa.select(*table.__table__.columns)).all()))
                for table in PROJECTION
            ]

    before = contents()
    assert len(before[0]) > 3
    with stack.sessions.begin() as session:  # what is wrong in it does not survive
        session.execute(sa.update(ReceiptRow).values(p_after=0.123, status="accepted"))
        session.add(ReceiptRow(feedback_id="fb_never_given", episode_id="ep", status="learned"))
    done = subprocess.run([*EVERLOOP, "feedback", "receipts", "--rebuild"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents() == before


def test_consent_holds_from_the_next_message_on(stack):
    user = f"shy-{uuid.uuid4().hex}"
    headers = {"X-Everloop-User": user}

    def learns(question):
        with stack.sessions() as session:
            return session.get_one(Episode, stack.ask(question, user=user).id).learn

    assert stack.http.get("/v1/me", headers=headers).json() == {
        "user": user,
        "learn": True,
        "learn_is_default": True,
    }
    assert learns("May I?")
    answer = stack.http.put("/v1/me/consent", json={"learn": False}, headers=headers).json()
    assert answer == {"user": user, "learn": False, "learn_is_default": False}
    assert not learns("And now?")
    done = subprocess.run([*EVERLOOP, "users", "consent", user, "--learn"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert learns("And again?")


@pytest.mark.parametrize("name", ["%00", "", "%ff", "a" * 129])
def test_a_name_that_no_user_can_have_is_refused(stack, name):
    answer = stack.http.get("/v1/me", headers={"X-Everloop-User": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_user")


def test_metrics_show_what_waits_and_who_is_behind(stack):
    text = stack.http.get("/metrics").text
    assert "everloop_log_up 1.0" in text and "everloop_outbox_waiting_events" in text
    assert 'everloop_consumer_lag_records{consumer="reward",partition="0",topic="everloop.feedback"}' in text
    assert 'consumer="receipts"' in text
