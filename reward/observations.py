"""What each kind of signal says to the reward model: a direction in feature space, and a target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feedback.fold import Standing
from feedback.tables import Episode
from reward.kinds import verdict_of

# A comment says why, in words; it points nowhere.
LEARNED_KINDS = frozenset(
    {"thumb", "rating", "preference", "correction", "reasons", "implicit", "verifier", "judge"}
)
PAIRS = frozenset({"preference", "correction"})


def reason_against(episode: Episode | None) -> str | None:
    """Return why nothing may be learned from an answer, as a stable key, or None."""
    if episode is None:
        return "episode_unknown"
    if episode.excluded:
        return "answer_excluded"
    if not episode.learn:
        return "no_consent"
    if episode.finish_reason == "tool_calls":
        return "answer_waits"  # for a tool: what was said beside the call is no answer
    return None if episode.answer.strip() else "answer_empty"


def observation(signal: Standing, phis: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], float] | None:
    """Return (z, target) of a signal that stands, or None where it says neither good nor bad.

    Parameters
    ----------
    phis
        Features, shape ``(dim,)`` each: of the answer, and of the one that it is compared with, if there is one.
    """
    if signal.kind == "preference":
        return phis[0] - phis[1], 1.0
    if signal.kind == "correction":
        return phis[1] - phis[0], 1.0
    verdict = verdict_of(signal)
    return None if verdict is None else (phis[0], verdict)
