"""The reward that training sees: pessimistic, against a reference answer, from a pinned snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward.encoder import BATCH_ANSWERS, Encoder
from reward.online import BayesianHead, pessimistic


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
        """Return the reward of each answer to each prompt, relative to the prompt's reference answer."""
        flat = [(prompt, a) for prompt, group in zip(prompts, answers, strict=True) for a in group]
        flat += list(zip(prompts, references, strict=True))
        blocks = []
        for start in range(0, len(flat), 4 * BATCH_ANSWERS):
            blocks.append(self.encoder.encode(flat[start : start + 4 * BATCH_ANSWERS]))
            on_done(min(start + 4 * BATCH_ANSWERS, len(flat)))
        features = np.concatenate(blocks).astype(np.float64)
        references_at = len(flat) - len(references)
        rewards, at = [], 0
        for index, group in enumerate(answers):
            z = features[at : at + len(group)] - features[references_at + index]
            rewards.append([pessimistic(s.mean, s.sd, self.kappa) for s in self.head.predict_many(z)])
            at += len(group)
        return rewards
