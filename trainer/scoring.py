"""The reward that training sees: pessimistic, against a reference answer, from a pinned snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import IntegrityError
from reward.encoder import Answer, Encoder
from reward.online import BayesianHead, pessimistic
from reward.store import answer_digest
from reward.style import num_words

LENGTH_LOSS = 1.0  # for each halving or doubling beyond the range: enough to show the way back
CUT_LOSS = 1.0
LOWEST_REWARD = pessimistic(-math.inf, 0.0, 0.0)  # where rewards are clipped


class PinnedReward:
    """Scores answers under one frozen posterior.

    Parameters
    ----------
    head
        The posterior; never refitted in mid-run.
    kappa
        Standard deviations taken off the mean.

    Raises
    ------
    IntegrityError
        Code ``reward_not_finite``: every reward would be no number.
    """

    def __init__(self, encoder: Encoder, head: BayesianHead, kappa: float) -> None:
        if not (np.isfinite(head.theta).all() and np.isfinite(head.covariance).all()):
            raise IntegrityError(
                "The reward model holds what is no number. `everloop reward replay` learns it anew.",
                code="reward_not_finite",
            )
        self.encoder = encoder
        self.head = head
        self.kappa = kappa
        self._met: dict[str, tuple[NDArray[Any], Any]] = {}

    def remember(self, features: Mapping[str, NDArray[np.float64]]) -> None:
        """Take up features that were computed before, by the digests of their answers."""
        self._met.update((digest, (row, True)) for digest, row in features.items())

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
        return self.score_under([(self.head, self.kappa)], prompts, answers, references, on_done)[0]

    def score_under(
        self,
        judges: Sequence[tuple[BayesianHead, float]],
        prompts: Sequence[list[dict[str, Any]]],
        answers: Sequence[Sequence[str]],
        references: Sequence[str],
        on_done: Callable[[int], None] = lambda done: None,
    ) -> list[list[list[float]]]:
        """Return what each (head, kappa) gives the answers, as :meth:`score` does; they are encoded once."""
        flat = [(prompt, a) for prompt, group in zip(prompts, answers, strict=True) for a in group]
        flat += list(zip(prompts, references, strict=True))
        features, usable = self.features(flat, on_done)
        references_at = len(flat) - len(references)
        rewards: list[list[list[float]]] = [[] for _ in judges]
        at = 0
        for index, group in enumerate(answers):
            here, reference = slice(at, at + len(group)), references_at + index
            for given, (head, kappa) in zip(rewards, judges, strict=True):
                if not usable[reference]:
                    given.append([0.0] * len(group))
                    continue
                scores = head.predict_many(features[here] - features[reference]) if group else []
                scored = zip(scores, usable[here], strict=True)
                given.append([pessimistic(s.mean, s.sd, kappa) if ok else LOWEST_REWARD for s, ok in scored])
            at += len(group)
        return rewards

    def features(
        self, answers: Sequence[Answer], on_done: Callable[[int], None] = lambda done: None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return features, shape ``(n, dim)``, and which are usable; what was met before is not encoded again."""
        keys = [answer_digest(messages, text) for messages, text in answers]
        new = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in self._met}
        encoded, usable = self.encoder.encode_usable(list(new.values()), on_done)
        self._met.update(zip(new, zip(encoded, usable, strict=True), strict=True))
        met = [self._met[key] for key in keys]
        features = np.array([row for row, _ in met], np.float64).reshape(len(met), self.encoder.dim)
        return features, np.array([ok for _, ok in met], np.bool_)


def guarded(
    rewards: Sequence[float], answers: Sequence[str], ended: Sequence[bool], words_range: tuple[int, int]
) -> list[float]:
    """Return rewards less what answers lose that were cut off, or have lengths that nobody rated well.

    Otherwise a policy drifts to whatever length the reward extrapolates best. Of lengths that nobody rated well
    nothing shows that they are better than the reference, however sure the reward is. The loss grows with the
    distance, so that of answers that are all outside the range the nearest is still the best.
    """
    low, high = words_range
    found = []
    for reward, answer, whole in zip(rewards, answers, ended, strict=True):
        words = max(num_words(answer), 1)
        doublings = max(math.log2(max(low, 1) / words), math.log2(words / max(high, 1)), 0.0)
        reward = min(reward, 0.0) if doublings else reward
        found.append(max(reward - LENGTH_LOSS * doublings - (0.0 if whole else CUT_LOSS), LOWEST_REWARD))
    return found
