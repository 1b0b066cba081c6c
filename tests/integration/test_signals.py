"""Every kind of signal through the API, what is refused, and which of them stand."""

import json
import uuid
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.fold import fold, standing_ids, standing_of
from feedback.signals import KINDS
from feedback.tables import Feedback
from infra.ids import new_id

SAID = {
    "thumb": {"value": 1},
    "rating": {"value": 4},
    "reasons": {"reasons": ["too_long", "incorrect"]},
    "comment": {"text": "The date is wrong."},
    "correction": {"text": "Paris."},
    "implicit": {"name": "copied"},
    "verifier": {"value": -1, "score": 0.25, "text": "1 of 4 tests passed"},
    "judge": {"score": 0.5, "text": "Fair."},
}
WITHDRAWN = {
    "thumb": {"value": 0},
    "rating": {"value": 0},
    "reasons": {"reasons": []},
    "comment": {"value": 0},
    "correction": {"value": 0},
    "verifier": {"value": 0},
}


@pytest.fixture(scope="module")
def two(stack):
    """Two answers to the same message."""
    return [stack.ask("What is wind?").id for _ in range(2)]


def standing(stack, episode_id):
    return stack.http.get(f"/v1/episodes/{episode_id}").json()["feedback"]


def test_every_kind_is_accepted_and_stands_until_it_is_withdrawn(stack, two):
    assert set(SAID) | {"preference"} == KINDS
    for kind, fields in SAID.items():
        assert stack.feedback(two[0], kind=kind, **fields).status_code == 202, kind
    assert stack.feedback(two[0], kind="preference", over=two[1]).status_code == 202
    shown = {signal["kind"]: signal for signal in standing(stack, two[0])}
    assert set(shown) == KINDS
    for kind, fields in SAID.items():
        for name, value in fields.items():
            assert shown[kind][name] == (sorted(value) if name == "reasons" else value)
    for kind, fields in WITHDRAWN.items():
        assert stack.feedback(two[0], kind=kind, **fields).status_code == 202, kind
    assert {signal["kind"] for signal in standing(stack, two[0])} == {"preference", "implicit", "judge"}


def test_a_preference_turned_round_supersedes_the_first(stack, two):
    stack.feedback(two[0], kind="preference", over=two[1])
    stack.feedback(two[1], kind="preference", over=two[0])
    assert not [s for s in standing(stack, two[0]) if s["kind"] == "preference"]
    assert [s["over"] for s in standing(stack, two[1]) if s["kind"] == "preference"] == [two[0]]


def test_a_preference_between_answers_to_different_messages_is_refused(stack, two):
    other = stack.ask("What is sleet?").id
    reply = stack.feedback(two[0], kind="preference", over=other)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "not_the_same_message")


def test_implicit_acts_stand_beside_each_other(stack, two):
    for name in ("copied", "regenerated", "copied"):
        stack.feedback(two[1], kind="implicit", name=name)
    assert sorted(s["name"] for s in standing(stack, two[1]) if s["kind"] == "implicit") == [
        "copied",
        "regenerated",
    ]


def test_somebody_elses_episode_is_not_there(stack, two):
    strange = stack.ask("What is hail?", user="stranger").id
    answers = [stack.feedback(strange, kind=kind, **fields) for kind, fields in SAID.items()]
    by_kind = dict(zip(SAID, answers, strict=True))
    for kind in ("verifier", "judge"):  # programs rate whose answer it may be
        assert by_kind.pop(kind).status_code == 202
    for answer in (
        *by_kind.values(),
        stack.feedback(two[0], kind="preference", over=strange),
        stack.http.get(f"/v1/episodes/{strange}"),
    ):
        missing = json.loads(answer.text.replace(strange, "ep_nope"))
        assert answer.status_code == 404
        unknown = stack.feedback("ep_nope", kind="thumb", value=1).json()
        assert missing["error"]["message"] == unknown["error"]["message"], "a stranger learns that it exists"


@pytest.mark.parametrize(
    ("field", "kind", "extra", "longest"),
    [
        ("text", "correction", {}, 16_000),
        ("text", "comment", {}, 4_000),
        ("idempotency_key", "thumb", {"value": 1}, 128),
    ],
)
def test_texts_at_their_limit_pass_and_past_it_do_not(stack, two, field, kind, extra, longest):
    def send(length):
        text = uuid.uuid4().hex + "é" * (length - 32)
        return stack.feedback(two[0], kind=kind, **{**extra, field: text}).status_code

    assert (send(longest), send(longest + 1)) == (202, 400)


FUTURE = (datetime.now(UTC) + timedelta(days=1)).isoformat()


@pytest.mark.parametrize(
    ("signal", "param"),
    [
        ({"kind": "thumb", "value": 2}, "value"),
        ({"kind": "thumb", "value": True}, "value"),
        ({"kind": "thumb", "value": "1"}, "value"),
        ({"kind": "rating", "value": 6}, "value"),
        ({"kind": "rating", "value": 2.5}, "value"),
        ({"kind": "reasons", "reasons": ["because"]}, "reasons.0"),
        ({"kind": "reasons", "reasons": "incorrect"}, "reasons"),
        ({"kind": "comment", "text": " "}, None),
        ({"kind": "comment", "text": "x", "value": 0}, None),
        ({"kind": "comment", "text": "a\x00b"}, "text"),
        ({"kind": "implicit", "name": "stared"}, "name"),
        ({"kind": "judge", "score": 1.01}, "score"),
        ({"kind": "judge", "score": None}, "score"),
        ({"kind": "verifier", "value": 1, "score": -0.1}, "score"),
        ({"kind": "thumb", "value": 1, "given_at": FUTURE}, "given_at"),
        ({"kind": "thumb", "value": 1, "given_at": "2026-01-01T00:00:00"}, "given_at"),
        ({"kind": "thumb", "value": 1, "user": "u" * 129}, "user"),
        ({"kind": "thumb", "value": 1, "user": ""}, "user"),
        ({"kind": "thumb", "value": 1, "idempotency_key": None}, "idempotency_key"),
        ({"kind": "thumb", "value": 1, "more": 1}, "more"),
        ({"kind": ["thumb"]}, None),
        ({}, None),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_writes_nothing(stack, two, signal, param):
    before = num_signals(stack)
    body = {"episode_id": two[0], "user": "tester", "idempotency_key": uuid.uuid4().hex, **signal}
    # Not httpx's own JSON, which refuses what others send.
    response = stack.http.post("/v1/feedback", content=json.dumps(body), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert num_signals(stack) == before


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"kind": "thumb", "value": NaN}', 400, "invalid_request"),
        (
            b'{"kind": "comment", "text": "\\ud800", "episode_id": "e", "user": "u", "idempotency_key": "k"}',
            400,
            None,
        ),
        (b"[" * 10_000 + b"]" * 10_000, 400, None),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, None),
        (b"\xff\xfe", 400, None),
        (b"x" * 300_000, 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/feedback", "/v1/feedback/batch"])
def test_what_cannot_be_a_request_is_refused(stack, path, content, status, code):
    response = stack.http.post(path, content=content, headers=JSON)
    assert response.status_code == status, response.text[:500]
    assert code is None or response.json()["error"]["code"] == code


def num_signals(stack):
    with stack.sessions() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Feedback))


def test_a_batch_takes_what_is_good_and_says_what_is_not(stack, two):
    good = {
        "episode_id": two[0],
        "user": "tester",
        "kind": "thumb",
        "value": 1,
        "idempotency_key": uuid.uuid4().hex,
    }
    signals = [good, {**good, "episode_id": "ep_nope", "idempotency_key": "n"}, good, {**good, "value": -1}]
    answer = stack.http.post("/v1/feedback/batch", json={"signals": signals})
    assert answer.status_code == 202 and answer.json()["num_accepted"] == 2
    first, missing, again, other = answer.json()["results"]
    assert missing["error"]["code"] == "episode_not_found" and other["error"]["code"] == "idempotency_key_reused"
    assert again["accepted"] == {**first["accepted"], "repeated": True} and not first["accepted"]["repeated"]


def test_a_batch_with_a_malformed_signal_names_it_and_writes_nothing(stack, two):
    good = {
        "episode_id": two[0],
        "user": "tester",
        "kind": "thumb",
        "value": 1,
        "idempotency_key": uuid.uuid4().hex,
    }
    before = num_signals(stack)
    for signals, param in (
        ([good, {**good, "value": 7}], "signals.1.value"),
        ([], "signals"),
        ([good] * 1001, "signals"),
    ):
        answer = stack.http.post("/v1/feedback/batch", json={"signals": signals})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert num_signals(stack) == before


histories = st.lists(
    st.tuples(
        st.sampled_from(["anna", "ben"]),
        st.sampled_from(["thumb", "reasons", "preference"]),
        st.sampled_from(["slot-1", "slot-2"]),
        st.integers(-1, 1),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories)
def test_the_fold_in_sql_is_the_fold(stack, two, history):
    mark = uuid.uuid4().hex
    with stack.sessions() as session:
        for user, kind, slot, value in history:
            session.add(
                Feedback(
                    id=new_id("fb"),
                    episode_id=two[0],
                    user_id=f"{user}-{mark}",
                    kind=kind,
                    slot=f"{slot}-{mark}",
                    value=None if kind == "reasons" else value,
                    reasons=["incorrect"] * abs(value) if kind == "reasons" else None,
                    idempotency_key=uuid.uuid4().hex,
                    body_digest="",
                )
            )
            session.flush()
        rows = session.scalars(sa.select(Feedback).where(Feedback.user_id.endswith(mark))).all()
        in_sql = set(
            session.scalars(standing_ids().where(sa.literal_column("anon_1.id").in_([r.id for r in rows])))
        )
        assert in_sql == {signal.feedback_id for signal in standing_of(rows)}
        assert fold(reversed([*map(_as_is, standing_of(rows))])) == standing_of(rows)
        session.rollback()


def _as_is(signal):
    return signal
