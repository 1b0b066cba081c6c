"""Thumbs move the weights of importance towards what people like, and nowhere where they mean nothing."""

from __future__ import annotations

import random

import numpy as np

from agent.memory import learning
from agent.memory.importance import NAMES, Weights
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
    weights, usual = state.weights(has_vectors=True), Weights()
    assert weights.pinned == usual.pinned and weights.corrected == usual.corrected
    assert weights.meaning > usual.meaning
