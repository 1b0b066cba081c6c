"""Who rates at all, and what: inverse-propensity weights for answers that are rated by choice.

People rate some answers more readily than others, and some people rate everything. A rating of an answer that is
seldom rated stands for many that were not: it weighs mean propensity over its own, clipped. Answers whose rating
was asked for at random show what the weights should achieve (:class:`Anchor`).

References
----------
Swaminathan and Joachims (2015), The self-normalized estimator for counterfactual learning. arXiv 2603.18736,
propensity-corrected reward modelling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reward.calibration import logit
from reward.online import BayesianHead

MAX_WEIGHT = 5.0
MIN_SEEN = 100  # with fewer answers known to be rated or not, every rating weighs the same
NUM_INPUTS = 7
PRIOR_VARIANCE = 1.0


def inputs(p_good: float, sd: float, log_words: float, seen: int, rated: int, asked: bool) -> NDArray[np.float64]:
    """Return what the choice to rate may depend on.

    Parameters
    ----------
    p_good, sd
        What was believed of the answer when it was new.
    log_words
        The style feature of its length.
    seen, rated
        Answers that its user had been given and had rated before.
    asked
        Whether a rating was asked for.
    """
    habit = logit((rated + 0.5) / (seen + 1.0)) if seen >= rated else 0.0
    confidence = abs(p_good - 0.5) * 2.0
    return np.array([1.0, p_good - 0.5, confidence, math.log1p(sd), log_words, habit / 2.0, float(asked)])


@dataclass(slots=True)
class Propensity:
    """P(rated), learned from answers of which it is known whether they were.

    Attributes
    ----------
    theta, covariance
        Of a small Bayesian logistic head.
    num_seen, num_rated
        Answers that it learned from.
    """

    theta: list[float] = field(default_factory=lambda: [0.0] * NUM_INPUTS)
    covariance: list[float] = field(default_factory=lambda: list((np.eye(NUM_INPUTS) * PRIOR_VARIANCE).ravel()))
    num_seen: int = 0
    num_rated: int = 0
    loss: float = 0.0
    constant_loss: float = 0.0

    def learn(self, x: NDArray[np.float64], *, rated: bool) -> None:
        """Learn whether an answer was rated; predict first, for the report."""
        head = self._head()
        constant = (self.num_rated + 1.0) / (self.num_seen + 2.0)
        _, before, _ = head.learn_scored(x, float(rated))
        self.loss -= math.log(max(before.p_good if rated else 1.0 - before.p_good, 1e-12))
        self.constant_loss -= math.log(constant if rated else 1.0 - constant)
        self.theta, self.covariance = head.theta.tolist(), head.covariance.ravel().tolist()
        self.num_seen += 1
        self.num_rated += rated

    def weight(self, x: NDArray[np.float64], ask_propensity: float) -> float:
        """Return the weight of a rating, in [1/5, 5]; 1 while too little is known.

        Parameters
        ----------
        x
            What :func:`inputs` returned for the answer.
        ask_propensity
            Probability with which a rating was asked for: whether it was is chance, and is averaged over.
        """
        if self.num_seen < MIN_SEEN or not self.num_rated:
            return 1.0
        unasked, asked = x.copy(), x.copy()
        unasked[-1], asked[-1] = 0.0, 1.0
        if_not, if_asked = (score.p_good for score in self._head().predict_many(np.stack([unasked, asked])))
        propensity = ask_propensity * if_asked + (1.0 - ask_propensity) * if_not
        mean = self.num_rated / self.num_seen
        return min(MAX_WEIGHT, max(1.0 / MAX_WEIGHT, mean / max(propensity, 1e-6)))

    def _head(self) -> BayesianHead:
        return BayesianHead(np.array(self.theta), np.array(self.covariance).reshape(NUM_INPUTS, NUM_INPUTS))

    def report(self) -> dict[str, object]:
        """Return how well it foretells who rates, against a constant."""
        n = max(self.num_seen, 1)
        return {
            "n": self.num_seen,
            "rated": self.num_rated,
            "log_loss": self.loss / n,
            "constant_log_loss": self.constant_loss / n,
        }


@dataclass(slots=True)
class Anchor:
    """Mean verdicts: where a rating was asked for at random; and by choice, plain and weighted."""

    asked: list[float] = field(default_factory=lambda: [0.0, 0.0])
    chosen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    weighted: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def observe(self, verdict: float, weight: float, *, asked_at_random: bool) -> None:
        """Count one verdict (0 to 1)."""
        for sums, w in ((self.asked, 1.0),) if asked_at_random else ((self.chosen, 1.0), (self.weighted, weight)):
            sums[0] += w
            sums[1] += w * verdict

    def report(self) -> dict[str, float | None]:
        """Return the means; weighted should be nearer to asked than chosen is."""
        means = {
            name: sums[1] / sums[0] if sums[0] else None
            for name, sums in (("asked", self.asked), ("chosen", self.chosen), ("weighted", self.weighted))
        }
        return {"num_asked": self.asked[0], "num_chosen": self.chosen[0], **means}
