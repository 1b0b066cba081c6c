"""Which signals stand, and what a signal may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feedback.fold import Standing, fold
from feedback.signals import read_signal


def standing(seq, episode, user, value):
    return Standing(f"fb_{seq}", seq, episode, user, "thumb", episode, value)


histories = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from([-1, 0, 1])), max_size=20
).map(lambda rows: [standing(i, *row) for i, row in enumerate(rows)])


@given(histories, st.randoms(use_true_random=False))
def test_the_fold_ignores_order_and_repetition(history, random):
    shuffled = history + history[: len(history) // 2]
    random.shuffle(shuffled)
    assert fold(shuffled) == fold(history)


@given(histories)
def test_the_latest_signal_stands_and_a_withdrawn_one_does_not(history):
    for signal in fold(history):
        later = [
            s
            for s in history
            if (s.episode_id, s.user_id) == (signal.episode_id, signal.user_id) and s.seq > signal.seq
        ]
        assert not later and signal.value != 0


BASE = {"episode_id": "ep_1", "user": "u", "idempotency_key": "k"}


@pytest.mark.parametrize(
    "extra",
    [
        {"kind": "thumb"},
        {"kind": "thumb", "value": 2},
        {"kind": "thumb", "value": 1, "text": "x"},
        {"kind": "correction"},
        {"kind": "correction", "text": ""},
        {"kind": "correction", "text": "x" * 16_001},
        {"kind": "correction", "text": "a\x00b"},
        {"kind": "correction", "text": "a\ud800b"},
        {"kind": "praise", "value": 1},
        {"kind": "thumb", "value": 1, "unknown": 1},
    ],
)
def test_a_signal_that_does_not_fit_its_kind_is_refused(extra):
    with pytest.raises(ValidationError):
        read_signal.validate_python({**BASE, **extra})


def test_the_digest_tells_a_retry_from_another_signal():
    first = read_signal.validate_python({**BASE, "kind": "thumb", "value": 1})
    retry = read_signal.validate_python({**BASE, "kind": "thumb", "value": 1, "idempotency_key": "other"})
    other = read_signal.validate_python({**BASE, "kind": "thumb", "value": -1})
    assert first.digest() == retry.digest() != other.digest()
