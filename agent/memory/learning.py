"""Learning what importance weighs, from the thumbs on answers: a small step of an evolution strategy for each.

Each context is built with weights a little off the current ones, by steps that its episode records. A thumb on the
answer moves the weights along these steps, as far as it was better than the thumbs before it:

    shift += RATE * (value - baseline) * offsets - DECAY * shift

which follows the gradient of the expected value (Williams, 1992; Salimans et al., 2017), and falls back to the
defaults where the thumbs say nothing. Each episode counts once.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from agent.memory.importance import BY_WORDS_ALONE, NAMES, Weights
from agent.tables import MemoryVote, MemoryWeights
from infra.db import lock_until_commit

SCALE = 0.2  # standard deviation of the steps, as a share of what is usual for each weight
RATE = 0.01
DECAY = 0.0005  # so that thumbs without any meaning lead nowhere: about 0.3 off the defaults in the long run
BASELINE_RATE = 0.05
MOST_FACTOR = 3.0  # a weight stays within so many times its default
LEARNED = tuple(name for name in NAMES if name not in ("corrected", "pinned"))  # what people asked for is theirs
USUAL = {name: max(abs(value), 0.25) for name, value in asdict(Weights()).items()}


@dataclass(frozen=True, slots=True)
class Draw:
    """Weights for one context: a version, and steps off it in units of `SCALE`; none where nothing is tried."""

    version: int
    weights: Weights
    offsets: dict[str, float]


@dataclass(frozen=True, slots=True)
class State:
    """The weights in force, as multiples of what is usual for each are added to their defaults."""

    version: int
    shift: dict[str, float]
    baseline: float
    num_votes: int

    def weights(self, *, has_vectors: bool) -> Weights:
        """Return the weights: the defaults, and what was learned."""
        return shifted(Weights() if has_vectors else BY_WORDS_ALONE, self.shift)


def shifted(weights: Weights, shift: dict[str, float]) -> Weights:
    """Return weights moved by multiples of what is usual for each."""
    return Weights(**{name: value + USUAL[name] * shift.get(name, 0.0) for name, value in asdict(weights).items()})


def current(session: Session) -> State:
    """Return the state in force; version 0 is what nothing was learned of."""
    row = session.scalar(sa.select(MemoryWeights).order_by(MemoryWeights.version.desc()).limit(1))
    return State(row.version, row.weights, row.baseline, row.num_votes) if row else State(0, {}, 0.0, 0)


def draw(session: Session, *, has_vectors: bool, explores: bool, rng: random.Random | None = None) -> Draw:
    """Return the weights for a context; where it `explores`, a random step off those in force."""
    state = current(session)
    if not explores:
        return Draw(state.version, state.weights(has_vectors=has_vectors), {})
    offsets = {name: round((rng or random).gauss(0.0, 1.0), 3) for name in LEARNED}
    tried = {name: state.shift.get(name, 0.0) + SCALE * offsets.get(name, 0.0) for name in NAMES}
    defaults = Weights() if has_vectors else BY_WORDS_ALONE
    return Draw(state.version, shifted(defaults, tried), offsets)


def step(state: State, offsets: dict[str, float], value: float) -> State:
    """Return the state after a thumb (-1 or 1) on an answer whose context was built with these steps."""
    size = RATE * (value - state.baseline)
    most = MOST_FACTOR - 1.0
    shift = {
        name: float(
            np.clip((1.0 - DECAY) * state.shift.get(name, 0.0) + size * offsets.get(name, 0.0), -most, most)
        )
        for name in LEARNED
    }
    baseline = state.baseline + BASELINE_RATE * (value - state.baseline)
    return State(state.version, shift, baseline, state.num_votes + 1)


def learn(session: Session, episode_id: str, record: dict[str, Any] | None, value: int) -> bool:
    """Take a thumb on an answer into account, within the caller's transaction; return whether it moved anything.

    The first thumb on an answer counts; later ones, and the same one delivered again, do not.
    """
    offsets = (record or {}).get("drawn")
    if not offsets or value not in (-1, 1):
        return False
    lock_until_commit(session, "memory-weights")
    state = current(session)
    vote = insert(MemoryVote).values(episode_id=episode_id, value=value, version=state.version + 1)
    if session.scalar(vote.on_conflict_do_nothing().returning(MemoryVote.episode_id)) is None:
        return False
    _keep(session, step(state, {name: float(each) for name, each in offsets.items()}, value), "thumb")
    return True


def reset(session: Session, reason: str) -> None:
    """Go back to the defaults, as a new version."""
    lock_until_commit(session, "memory-weights")
    _keep(session, State(0, {}, 0.0, 0), reason)


def _keep(session: Session, state: State, reason: str) -> None:
    session.add(
        MemoryWeights(
            weights={name: round(value, 5) for name, value in state.shift.items()},
            baseline=state.baseline,
            num_votes=state.num_votes,
            reason=reason,
        )
    )
    session.flush()
