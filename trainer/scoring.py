"""The reward that training sees: pessimistic, against a reference answer, from a pinned snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward.encoder import BATCH_ANSWERS, Answer, Encoder
from reward.online import BayesianHead, pessimistic

LOWEST_REWARD = pessimistic(-math.inf, 0.0, 0.0)  # where rewards are clipped


class PinnedReward:
    """Scores answers under one frozen posterior.

    Parameters
    ----------
    head
        The posterior; never refitted in mid-run.
    kappa
        Standard deviations taken off the mean.
    """

    def __init__(self, encoder: Encoder, head: BayesianHead, kappa: float) -> None:
        self.encoder = encoder
        self.head = head
        self.kappa = kappa

    def score(
        self,
        prompts: Sequence[list[dict[str, Any]]],
        answers: Sequence[Sequence[str]],
        references: Sequence[str],
        on_done: Callable[[int], None] = lambda done: None,
    ) -> list[list[float]]:
        """Return the reward of each answer to each prompt, relative to the prompt's reference answer.

        An answer that the encoder refuses (empty, or far too long) gets the lowest reward there is. Against a
        reference that it refuses nothing can be said: all rewards of that prompt are 0.
        """
        flat = [(prompt, a) for prompt, group in zip(prompts, answers, strict=True) for a in group]
        flat += list(zip(prompts, references, strict=True))
        usable = np.array([self.encoder.refusal(answer) is None for _, answer in flat], dtype=bool)
        features = self._features(flat, usable, on_done)
        references_at = len(flat) - len(references)
        rewards, at = [], 0
        for index, group in enumerate(answers):
            here = slice(at, at + len(group))
            scores = self.head.predict_many(features[here] - features[references_at + index])
            if usable[references_at + index]:
                scored = zip(scores, usable[here], strict=True)
                rewards.append([pessimistic(s.mean, s.sd, self.kappa) if ok else LOWEST_REWARD for s, ok in scored])
            else:
                rewards.append([0.0] * len(group))
            at += len(group)
        return rewards

    def _features(
        self, answers: Sequence[Answer], usable: NDArray[np.bool_], on_done: Callable[[int], None]
    ) -> NDArray[np.float64]:
        """Return features, shape ``(n, dim)``; those of unusable answers are 0."""
        features = np.zeros((len(answers), self.encoder.dim))
        for start in range(0, len(answers), 4 * BATCH_ANSWERS):
            chosen = (start + np.flatnonzero(usable[start : start + 4 * BATCH_ANSWERS])).tolist()
            features[chosen] = self.encoder.encode([answers[i] for i in chosen])
            on_done(min(start + 4 * BATCH_ANSWERS, len(answers)))
        return features
