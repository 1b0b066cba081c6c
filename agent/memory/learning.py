"""Learning what importance weighs, from the thumbs on answers: a small step of an evolution strategy for each.

Each context is built with weights a little off the current ones, by steps that its episode records. A thumb on the
answer moves the weights along these steps, as far as it was better than the thumbs before it:

    shift += RATE * (value - baseline) * offsets - DECAY * shift

which follows the gradient of the expected value (Williams, 1992; Salimans et al., 2017), and falls back to the
defaults where the thumbs say nothing. Of each answer the last thumb counts: what an earlier one has moved, as far
as it has not decayed, is taken back first.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from agent.memory.importance import BY_SENTENCES, NAMES, Weights
from agent.tables import MemoryVote, MemoryWeights
from infra.db import lock_until_commit

SCALE = 0.2  # standard deviation of the steps, as a share of what is usual for each weight
RATE = 0.01
DECAY = 0.0005  # so that thumbs without any meaning lead nowhere: about 0.3 off the defaults in the long run
BASELINE_RATE = 0.05
MOST_OFFSET = 4.0  # standard deviations
MOST_FACTOR = 3.0  # a weight stays within so many times its default
MOST_SHIFT = MOST_FACTOR - 1.0
BASELINE = "baseline"
THUMB, TAKEN_BACK = "thumb", "taken back"
LEARNED = tuple(name for name in NAMES if name not in ("corrected", "pinned"))  # what people asked for is theirs
USUAL = {name: max(abs(value), abs(getattr(BY_SENTENCES, name)), 0.25) for name, value in asdict(Weights()).items()}


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

    def weights(self, defaults: Weights) -> Weights:
        """Return the weights: the defaults of what is at hand, and what was learned."""
        return shifted(defaults, self.shift)


def shifted(weights: Weights, shift: dict[str, float]) -> Weights:
    """Return weights moved by multiples of what is usual for each; what is not at hand, and weighs 0, stays so."""
    moved = {name: value + USUAL[name] * shift.get(name, 0.0) for name, value in asdict(weights).items() if value}
    return replace(weights, **moved)


def current(session: Session) -> State:
    """Return the state in force; version 0 is what nothing was learned of."""
    # Columns rather than a row of the mapper: this is asked for each answer.
    columns = sa.select(
        MemoryWeights.version, MemoryWeights.weights, MemoryWeights.baseline, MemoryWeights.num_votes
    )
    row = session.execute(columns.order_by(MemoryWeights.version.desc()).limit(1)).first()
    return State(row.version, row.weights, row.baseline, row.num_votes) if row else State(0, {}, 0.0, 0)


def draw(session: Session, defaults: Weights, *, explores: bool, rng: random.Random | None = None) -> Draw:
    """Return the weights for a context; where it `explores`, a random step off those in force.

    Parameters
    ----------
    defaults
        The weights that suit what is at hand: words, their vectors, those of sentences.
    """
    state = current(session)
    if not explores:
        return Draw(state.version, state.weights(defaults), {})
    offsets = {name: round((rng or random).gauss(0.0, 1.0), 3) for name in LEARNED if getattr(defaults, name)}
    tried = {name: state.shift.get(name, 0.0) + SCALE * offsets.get(name, 0.0) for name in NAMES}
    return Draw(state.version, shifted(defaults, tried), offsets)


def step(state: State, offsets: dict[str, float], value: float) -> State:
    """Return the state after a thumb (-1 or 1) on an answer whose context was built with these steps."""
    size = RATE * (value - state.baseline)
    steps = {name: _within(offsets.get(name, 0.0), MOST_OFFSET) for name in LEARNED}
    shift = {
        name: _within((1.0 - DECAY) * state.shift.get(name, 0.0) + size * steps[name], MOST_SHIFT)
        for name in LEARNED
    }
    baseline = _within(state.baseline + BASELINE_RATE * (value - state.baseline), 1.0)
    return State(state.version, shift, baseline, state.num_votes + 1)


def moved(before: State, after: State) -> dict[str, float]:
    """Return what a step moved, besides the decay."""
    change = {name: after.shift.get(name, 0.0) - (1.0 - DECAY) * before.shift.get(name, 0.0) for name in LEARNED}
    return {**change, BASELINE: after.baseline - (1.0 - BASELINE_RATE) * before.baseline}


def taken_back(state: State, change: dict[str, float], num_since: int) -> State:
    """Return the state without what a step moved, so many steps ago."""
    left = (1.0 - DECAY) ** num_since
    shift = {
        name: _within(state.shift.get(name, 0.0) - left * change.get(name, 0.0), MOST_SHIFT) for name in LEARNED
    }
    baseline = _within(state.baseline - (1.0 - BASELINE_RATE) ** num_since * change.get(BASELINE, 0.0), 1.0)
    return State(state.version, shift, baseline, max(state.num_votes - 1, 0))


def _within(value: float, most: float) -> float:
    """Return a value within bounds; 0 for what is no number."""
    return float(np.clip(value, -most, most)) if np.isfinite(value) else 0.0


def lock(session: Session) -> None:
    """Have the weights to oneself until the transaction ends: who waits reads what the one before has written."""
    lock_until_commit(session, "memory-weights")


def learn(session: Session, episode_id: str, record: dict[str, Any] | None, value: int) -> bool:
    """Have the thumb that stands on an answer count, in the caller's transaction; return whether anything moved.

    Parameters
    ----------
    record
        How the context of the answer was made.
    value
        -1 or 1; 0 where none stands, or nothing may be learned from it.
    """
    offsets = (record or {}).get("drawn") or {}
    lock(session)
    vote = session.get(MemoryVote, episode_id, populate_existing=True)
    counted = vote.value if vote else 0
    if value == counted or (value and not offsets):
        return False
    if vote is not None and counted:
        _take_back(session, vote)
        vote.value, vote.moved = 0, None
    if value:
        before = current(session)
        after = step(before, {name: float(each) for name, each in offsets.items()}, value)
        vote = vote or MemoryVote(episode_id=episode_id)
        vote.value, vote.moved = value, moved(before, after)
        vote.version = _keep(session, after, THUMB)
        session.add(vote)
    session.flush()
    return True


def _take_back(session: Session, vote: MemoryVote) -> None:
    later = sa.select(MemoryWeights.version).where(MemoryWeights.version > vote.version)
    is_reset = MemoryWeights.weights == sa.literal({}, JSONB)
    # Of a thumb that an earlier version counted it is not known what it moved; a reset took all of them back.
    if vote.moved and session.scalar(later.where(is_reset).limit(1)) is None:
        thumbs = sa.select(sa.func.count()).select_from(later.where(MemoryWeights.reason == THUMB).subquery())
        _keep(session, taken_back(current(session), vote.moved, session.scalar(thumbs) or 0), TAKEN_BACK)


def reset(session: Session, reason: str) -> None:
    """Go back to the defaults, as a new version."""
    lock(session)
    _keep(session, State(0, {}, 0.0, 0), reason)


def _keep(session: Session, state: State, reason: str) -> int:
    """Write a state as the one in force; return its version."""
    row = MemoryWeights(
        weights={name: round(value, 7) for name, value in state.shift.items()},
        baseline=state.baseline,
        num_votes=state.num_votes,
        reason=reason,
    )
    session.add(row)
    session.flush()
    return row.version
