"""What each kind of signal says to the reward model: a direction in feature space, a target and a weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feedback.fold import Standing
from feedback.tables import Episode

# A correction says how the answer should have been, not how bad this one was: less than a vote each way.
CORRECTION_WEIGHT = 0.5
BEST_RATING = 5
LEARNED_KINDS = frozenset({"thumb", "rating", "preference", "correction"})


def reason_against(episode: Episode | None) -> str | None:
    """Return why nothing may be learned from an answer, as a stable key, or None."""
    if episode is None:
        return "episode_unknown"
    if not episode.learn:
        return "no_consent"
    return None if episode.answer else "answer_empty"


def observation(signal: Standing, phis: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], float, float]:
    """Return (z, target, weight) of a signal that stands.

    Parameters
    ----------
    phis
        Features, shape ``(dim,)`` each: of the answer, and of the one that it is compared with, if there is one.
    """
    if signal.kind == "thumb":
        return phis[0], 1.0 if signal.value == 1 else 0.0, 1.0
    if signal.kind == "rating":
        return phis[0], ((signal.value or 1) - 1) / (BEST_RATING - 1), 1.0
    if signal.kind == "preference":
        return phis[0] - phis[1], 1.0, 1.0
    return phis[1] - phis[0], 1.0, CORRECTION_WEIGHT
