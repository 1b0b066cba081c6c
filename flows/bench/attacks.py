"""Raters who flip their votes together, and a swarm of fresh accounts, against the guards of the learner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reward.learner import Change, Learner, Observation
from reward.online import BayesianHead

Attack = Literal["clean", "30", "45", "swarm"]
SEEDS = 3
NUM_HONEST, NUM_ATTACKERS, NUM_SWARM = 200, 10, 1_000
NOISE = 0.10  # of honest votes are wrong
GOLD = 0.05  # of votes are held against the truth
SHARES: dict[str, float] = {"clean": 0.0, "30": 0.3, "45": 0.45}


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote on a pair of the file."""

    pair: int
    rater: str
    right: bool
    gold: bool


class Kept:
    """What each rater said, in memory."""

    def __init__(self) -> None:
        self.raters: dict[str, str] = {}
        self._latest: dict[str, dict[str, Change]] = defaultdict(dict)

    def of_rater(self, rater: str) -> Sequence[Change]:
        """Return the latest change of each of their signals."""
        return list(self._latest[rater].values())

    def keep(self, changes: Sequence[Change]) -> None:
        """Note changes of known signals."""
        for change in changes:
            rater = self.raters.get(change.feedback_id)
            if rater is not None:
                self._latest[rater][change.feedback_id] = change


def votes(attack: Attack, num_pairs: int, seed: int) -> list[Vote]:
    """Return the votes of an attack, in the order of the file."""
    rng = np.random.default_rng(seed)
    if attack == "swarm":
        honest = np.sort(rng.choice(num_pairs, NUM_SWARM, replace=False))
        fresh = np.sort(rng.choice(num_pairs, NUM_SWARM, replace=False))
        cast = [
            (pair + rng.random(), int(pair), f"honest-{rng.integers(NUM_HONEST)}", bool(rng.random() > NOISE))
            for pair in honest
        ] + [(pair + rng.random(), int(pair), f"fresh-{n}", False) for n, pair in enumerate(fresh)]
        return [Vote(pair, rater, right, bool(rng.random() < GOLD)) for _, pair, rater, right in sorted(cast)]
    found = []
    for pair in range(num_pairs):
        if rng.random() < SHARES[attack]:
            rater, right = f"attacker-{rng.integers(NUM_ATTACKERS)}", False
        else:
            rater, right = f"honest-{rng.integers(NUM_HONEST)}", bool(rng.random() > NOISE)
        found.append(Vote(pair, rater, right, bool(rng.random() < GOLD)))
    return found


def accuracy(z: NDArray[np.float64], cast: Sequence[Vote], *, guarded: bool) -> float:
    """Return the prequential accuracy on the second half of the pairs, against the truth."""
    learner, kept = Learner(BayesianHead.prior(z.shape[1])), Kept()
    forecasts: dict[int, float] = {}
    for number, vote in enumerate(cast):
        if vote.pair >= len(z) // 2 and vote.pair not in forecasts:
            forecasts[vote.pair] = learner.head.predict_one(z[vote.pair]).p_good
        if not guarded:
            learner.head.learn_one(z[vote.pair], float(vote.right))
            continue
        name = f"vote-{number}"
        kept.raters[name] = vote.rater
        seen = Observation(name, vote.rater, "preference", z[vote.pair], float(vote.right), pair=True)
        kept.keep(learner.learn(seen, kept)[2])
        if vote.gold:
            kept.keep(learner.check(vote.rater, right=vote.right, book=kept))
            learner.teach(f"gold-{number}", z[vote.pair], 1.0)
    return float(np.mean([p > 0.5 for p in forecasts.values()]))


def measure(z: NDArray[np.float64]) -> dict[str, float]:
    """Return mean accuracies over seeds: clean, and under each attack, with the guards and without."""
    found: dict[str, float] = {}
    for attack in ("clean", "30", "45", "swarm"):
        name = attack if attack == "clean" else f"attack_{attack}"
        for guarded in (True, False):
            runs = [accuracy(z, votes(attack, len(z), seed), guarded=guarded) for seed in range(SEEDS)]
            found[name if guarded else f"{name}_unguarded"] = float(np.mean(runs))
    return found
