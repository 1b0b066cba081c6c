"""Which signals stand, and what a signal may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feedback.fold import Standing, fold
from feedback.signals import read_signal


def standing(seq, user, kind, slot, value):
    reasons = ("incorrect",) * abs(value) if kind == "reasons" else None
    return Standing(
        f"fb_{seq}", seq, slot, user, kind, slot, None if reasons is not None else value, reasons=reasons
    )


histories = st.lists(
    st.tuples(
        st.sampled_from("xy"),
        st.sampled_from(["thumb", "reasons", "preference"]),
        st.sampled_from("ab"),
        st.sampled_from([-1, 0, 1]),
    ),
    max_size=20,
).map(lambda rows: [standing(i, *row) for i, row in enumerate(rows)])


@given(histories, st.randoms(use_true_random=False))
def test_the_fold_ignores_order_and_repetition(history, random):
    shuffled = history + history[: len(history) // 2]
    random.shuffle(shuffled)
    assert fold(shuffled) == fold(history)


@given(histories, st.integers(0, 20))
def test_folding_a_part_first_changes_nothing_but_what_was_withdrawn(history, cut):
    """What stands of the whole is what stands of the later part, and of the earlier what nothing later replaced."""
    later_keys = {signal.key for signal in history[cut:]}
    expected = [s for s in fold(history[:cut]) if s.key not in later_keys] + fold(history[cut:])
    assert fold(history) == expected


@given(histories)
def test_the_latest_signal_stands_and_a_withdrawn_one_does_not(history):
    stands = fold(history)
    assert len({signal.key for signal in stands}) == len(stands)
    for signal in history:
        newest = max((s for s in history if s.key == signal.key), key=lambda s: s.seq)
        assert (signal in stands) == (signal == newest and not signal.withdrawn)


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
