"""A second opinion that training never sees: a reward head that learned from held-out conversations alone.

The learned reward that training follows (the proxy) may be fooled where it extrapolates. This one is fitted, in
each run, to what people said of the answers that are kept for judging: what fools the one need not fool the other.
It is no stranger to the proxy, though: both see the same features, and the proxy learned from these answers, too,
among four times as many others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reward.online import BayesianHead
from trainer.scoring import PinnedReward
from trainer.snapshot import Example

MIN_JUDGEMENTS = 20


@dataclass(frozen=True, slots=True)
class Gold:
    """A head, and from how many judgements it learned."""

    head: BayesianHead
    num_judgements: int

    @property
    def is_informed(self) -> bool:
        """Whether it learned from enough to be asked."""
        return self.num_judgements >= MIN_JUDGEMENTS


def fit(reward: PinnedReward, held_out: Sequence[Example]) -> Gold:
    """Return a head that learned from held-out answers: verdicts one by one, and what people compared."""
    answers = [
        (example.messages, text)
        for example in held_out
        for text in (example.answer, *example.corrections, *example.preferred_over)
    ]
    features, usable = reward.features(answers)
    head = BayesianHead.prior(reward.encoder.dim)
    num_judgements, at = 0, 0
    for example in held_out:
        here = at
        at += 1 + len(example.corrections) + len(example.preferred_over)
        if not usable[here]:
            continue
        for verdict in example.verdicts:
            head.learn_one(features[here], verdict)
            num_judgements += 1
        for offset in range(1, at - here):
            if usable[here + offset]:
                corrected = offset <= len(example.corrections)
                difference = features[here + offset] - features[here]
                head.learn_one(difference if corrected else -difference, 1.0)
                num_judgements += 1
    return Gold(head, num_judgements)
