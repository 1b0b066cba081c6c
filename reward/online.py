"""Bayesian logistic regression, one signal at a time (sequential Laplace).

The posterior is Gaussian with mean theta and covariance P. A signal adds a site: a pseudo-observation of
the logit with a precision and a target. A site is kept, so a withdrawn vote is taken out by a rank-one
downdate, without a replay.

References
----------
Spiegelhalter and Lauritzen (1990), Sequential updating of conditional probabilities on directed graphical
structures. MacKay (1992), The evidence framework applied to classification networks (the moderated output).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

NEWTON_STEPS = 30  # five or six are usual
MIN_PRECISION = 1e-9
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Site:
    """What one signal adds to the posterior: a Gaussian pseudo-observation of ``theta . z``."""

    z: Vector
    precision: float
    target: float


@dataclass(frozen=True, slots=True)
class Score:
    """A belief about one answer: mean and standard deviation of its logit, and P(good)."""

    mean: float
    sd: float
    p_good: float


def sigmoid(x: float) -> float:
    """Return the logistic function without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


class BayesianHead:
    """The posterior over a logistic head on `dim` features.

    Examples
    --------
    >>> head = BayesianHead.prior(2)
    >>> site = head.learn_one(np.array([1.0, 0.0]), 1.0)
    >>> head.predict_one(np.array([1.0, 0.0])).p_good > 0.5
    True
    >>> head.unlearn_one(site)
    >>> abs(head.predict_one(np.array([1.0, 0.0])).p_good - 0.5) < 1e-9
    True
    """

    def __init__(self, theta: Vector, covariance: Matrix) -> None:
        self.theta = theta
        self.covariance = covariance if covariance.flags.writeable else covariance.copy()

    @classmethod
    def prior(cls, dim: int, variance: float = 1.0) -> Self:
        """Return the head that knows nothing: zero mean, isotropic `variance`."""
        return cls(np.zeros(dim), np.eye(dim) * variance)

    @property
    def dim(self) -> int:
        """Number of features."""
        return int(self.theta.shape[0])

    def predict_one(self, z: Vector) -> Score:
        """Score one feature vector of shape ``(dim,)``."""
        return self.predict_many(z[None, :])[0]

    def predict_many(self, z: Matrix) -> list[Score]:
        """Score feature vectors of shape ``(n, dim)``."""
        means = z @ self.theta
        variances = np.maximum(np.einsum("nd,nd->n", z @ self.covariance, z), 0.0)
        return [_score(float(m), float(v)) for m, v in zip(means, variances, strict=True)]

    def learn_one(self, z: Vector, target: float, weight: float = 1.0) -> Site:
        """Learn that ``z`` was judged `target` (0 or 1) and return the site that was added.

        The mode of the one-dimensional posterior is found by Newton steps on the logit `a`. They start at the
        inflection point 0 (or the end of the possible range nearest to it), where the slope is steepest: from
        there each step falls short of the root, so none overshoots however far prior and vote are apart.
        """
        return self.learn_scored(z, target, weight)[0]

    def learn_scored(self, z: Vector, target: float, weight: float = 1.0) -> tuple[Site, Score, Score]:
        """Learn as :meth:`learn_one` does; return the site, and the score of ``z`` before and after.

        The scores cost nothing: along ``z`` the update has a closed form.
        """
        Pz = self.covariance @ z
        v = float(z @ Pz)
        m = float(z @ self.theta)
        a = min(max(0.0, m - weight * v), m + weight * v)
        for _ in range(NEWTON_STEPS):
            q = sigmoid(a)
            step = (a - m - weight * v * (target - q)) / (1.0 + weight * v * q * (1.0 - q))
            a -= step
            if abs(step) < 1e-12:
                break
        q = sigmoid(a)
        h = max(weight * q * (1.0 - q), MIN_PRECISION)
        site = Site(z, h, a + weight * (target - q) / h)
        self._observe(site, h, Pz, v, m)
        shrunk = v / (1.0 + h * v)
        return site, _score(m, v), _score(m + shrunk * h * (site.target - m), shrunk)

    def apply(self, site: Site) -> None:
        """Add a known site (recovery from the history)."""
        Pz = self.covariance @ site.z
        self._observe(site, site.precision, Pz, float(site.z @ Pz), float(site.z @ self.theta))

    def unlearn_one(self, site: Site) -> None:
        """Take a site out again by a rank-one downdate."""
        Pz = self.covariance @ site.z
        self._observe(site, -site.precision, Pz, float(site.z @ Pz), float(site.z @ self.theta))

    def _observe(self, site: Site, precision: float, Pz: Vector, v: float, m: float) -> None:
        gain = precision / (1.0 + precision * v)
        self.theta = self.theta + Pz * (gain * (site.target - m))
        # In place and in blocks that stay in the cache: quicker than whole matrices, and no memory to fault in.
        scaled = Pz * gain
        for start in range(0, self.dim, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            self.covariance[rows] -= np.multiply.outer(Pz[rows], scaled)

    def digest(self) -> str:
        """Return the SHA-256 of the state."""
        return hashlib.sha256(self.theta.tobytes() + self.covariance.tobytes()).hexdigest()


def _score(mean: float, variance: float) -> Score:
    return Score(mean, math.sqrt(variance), sigmoid(mean / math.sqrt(1.0 + math.pi * variance / 8.0)))


def pessimistic(mean: float, sd: float, kappa: float, clip: float = 8.0) -> float:
    """Return the reward used in training: mean minus `kappa` standard deviations, clipped."""
    return max(-clip, min(clip, mean - kappa * sd))
