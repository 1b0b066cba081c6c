"""Thumbs move the weights of importance towards what people like, and nowhere where they mean nothing."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from agent.memory import learning
from agent.memory.importance import BY_SENTENCES, BY_WORDS_ALONE, NAMES, Weights
from agent.memory.learning import LEARNED, SCALE, State

VOTES = 6000


def play(seed: int, likes) -> State:
    """Give thumbs to contexts, each built with weights a little off those in force."""
    rng = random.Random(seed)
    state = State(0, {}, 0.0, 0)
    for _ in range(VOTES):
        offsets = {name: rng.gauss(0.0, 1.0) for name in LEARNED}
        tried = np.array([state.shift.get(name, 0.0) + SCALE * offsets[name] for name in LEARNED])
        value = 1 if rng.random() < likes(tried) else -1
        state = learning.step(state, offsets, value)
    return state


def at(state: State) -> np.ndarray:
    return np.array([state.shift.get(name, 0.0) for name in LEARNED])


def test_a_hidden_optimum_is_approached() -> None:
    for seed in range(3):
        hidden = np.random.default_rng(seed).choice([-0.8, 0.8], len(LEARNED))

        def likes(tried: np.ndarray, hidden: np.ndarray = hidden) -> float:
            return float(1.0 / (1.0 + np.exp(0.5 * ((tried - hidden) ** 2).sum() - 2.0)))

        left = np.linalg.norm(at(play(seed, likes)) - hidden) / np.linalg.norm(hidden)
        assert left < 0.6, f"seed {seed}: {left:.2f} of the way is left"


def test_thumbs_without_meaning_lead_nowhere() -> None:
    for seed in range(3):
        moved = at(play(seed, lambda _: 0.7))
        # The random walk ends at RATE / sqrt(2 DECAY) times the spread of the thumbs.
        expected = learning.RATE / np.sqrt(2 * learning.DECAY) * np.sqrt(1 - 0.4**2)
        assert np.sqrt((moved**2).mean()) < 2 * expected


def test_a_weight_stays_within_its_bounds_and_pins_are_not_learned() -> None:
    state = State(0, {}, 0.0, 0)
    for _ in range(5000):
        state = learning.step(state, dict.fromkeys(NAMES, 3.0), 1)
        state = State(0, state.shift, -1.0, 0)  # as if it never got used to it
    assert max(state.shift.values()) <= learning.MOST_FACTOR - 1.0
    weights, usual = state.weights(Weights()), Weights()
    assert weights.pinned == usual.pinned and weights.corrected == usual.corrected
    assert weights.meaning > usual.meaning


ANYTHING = st.floats(allow_nan=True, allow_infinity=True)
THUMB = st.tuples(st.dictionaries(st.sampled_from([*NAMES, "nonsense"]), ANYTHING), st.sampled_from([-1, 1]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(THUMB, st.booleans()), max_size=60), st.integers(1, 40))
def test_no_stream_of_thumbs_leads_out_of_bounds(stream, times) -> None:
    state = State(0, {}, 0.0, 0)
    for (offsets, value), is_undone in stream * times:
        after = learning.step(state, offsets, value)
        change = learning.moved(state, after)
        state = learning.taken_back(after, change, 0) if is_undone else after
    for defaults in (Weights(), BY_WORDS_ALONE, BY_SENTENCES):
        importance = np.exp(np.clip(state.weights(defaults).vector(), 0, None).sum())
        assert np.isfinite(importance), "all features at once"
    assert all(abs(each) <= learning.MOST_SHIFT for each in state.shift.values())
    assert abs(state.baseline) <= 1.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.floats(-4, 4), min_size=len(LEARNED)), st.sampled_from([-1, 1])), max_size=30),
    st.lists(st.floats(-4, 4), min_size=len(LEARNED), max_size=len(LEARNED)),
)
def test_what_is_taken_back_leaves_the_decay_and_what_it_did_to_later_steps(later, own) -> None:
    def play_later(state):
        for offsets, value in later:
            # The baseline says how surprising a thumb is; here all that comes later is as surprising in both.
            state = learning.step(State(0, state.shift, 0.0, 0), dict(zip(LEARNED, offsets, strict=False)), value)
        return state

    start = State(0, {}, 0.0, 0)
    after = learning.step(start, dict(zip(LEARNED, own, strict=True)), 1)
    undone = learning.taken_back(play_later(after), learning.moved(start, after), len(later))
    never = play_later(State(0, {}, 0.0, 0))
    assert undone.shift == pytest.approx({**dict.fromkeys(undone.shift, 0.0), **never.shift}, abs=1e-9)


def test_a_feature_that_is_not_at_hand_weighs_nothing_whatever_was_learned() -> None:
    learned = State(1, dict.fromkeys(NAMES, 1.0), 0.0, 1)
    assert learned.weights(Weights()).sentence == 0.0 and learned.weights(BY_SENTENCES).sentence > 10.0
    assert learned.weights(BY_SENTENCES).meaning == 0.0 and learned.weights(Weights()).meaning > 7.0
