"""Is the model right as often as it says? Kept prequentially: every signal is predicted before it is learned.

Three forecasts run side by side: the head's own; the same, recalibrated (a slope and an intercept on the logit,
learned from the stream); and that with the assistant's self-evaluation beside it. The simplest is used, unless
another has predicted better so far by a margin that luck does not explain.

References
----------
Guo et al. (2017), On calibration of modern neural networks (expected calibration error, temperature).
Dawid (1984), Present position and potential developments: the prequential approach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from reward.online import sigmoid

NUM_BINS = 10
MARGIN_NATS = 3.0  # twenty to one: a likelihood ratio of e^3 in favour of the more complicated forecast
MAX_LOGIT = 12.0
SLOPE_VARIANCE = 0.05


def logit(p: float) -> float:
    """Return the log-odds, within reason."""
    if p <= 0.0:
        return -MAX_LOGIT
    if p >= 1.0:
        return MAX_LOGIT
    return max(-MAX_LOGIT, min(MAX_LOGIT, math.log(p / (1.0 - p))))


def log_loss(p: float, target: float) -> float:
    """Return the loss in nats of a forecast; for a target between 0 and 1, its expectation."""
    p = min(max(p, 1e-12), 1.0 - 1e-12)
    return -(target * math.log(p) + (1.0 - target) * math.log(1.0 - p))


@dataclass(slots=True)
class Reliability:
    """A reliability table: forecasts by tenth, against what came."""

    counts: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    forecasts: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    outcomes: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)

    def observe(self, p: float, target: float, weight: float = 1.0) -> None:
        """Count a forecast and what came of it."""
        tenth = min(int(p * NUM_BINS), NUM_BINS - 1)
        self.counts[tenth] += weight
        self.forecasts[tenth] += weight * p
        self.outcomes[tenth] += weight * target

    def observe_pair(self, p: float) -> None:
        """Count a comparison that came out as foretold with `p`; which side is named first says nothing."""
        self.observe(p, 1.0, 0.5)
        self.observe(1.0 - p, 0.0, 0.5)

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean distance of forecast and outcome, weighted by count."""
        total = sum(self.counts)
        if not total:
            return None
        return sum(abs(p - y) for p, y in zip(self.forecasts, self.outcomes, strict=True)) / total

    def table(self) -> list[dict[str, float]]:
        """Return the rows that hold something: from, to, count, mean forecast, mean outcome."""
        return [
            {
                "from": tenth / NUM_BINS,
                "to": (tenth + 1) / NUM_BINS,
                "count": count,
                "forecast": self.forecasts[tenth] / count,
                "outcome": self.outcomes[tenth] / count,
            }
            for tenth, count in enumerate(self.counts)
            if count
        ]


@dataclass(slots=True)
class Forecast:
    """A recalibration of the head's logit by a small Bayesian head of its own, and how well it did.

    Attributes
    ----------
    mean, covariance
        Of the deviation from "as the head says": slope - 1, intercept and, where it is used, the self-evaluation's
        weight.
    loss, other_loss
        Summed log losses in nats, of this and of the simpler forecast, over the same signals.
    """

    size: int
    mean: list[float] = field(default_factory=list)
    covariance: list[float] = field(default_factory=list)
    num_seen: int = 0
    loss: float = 0.0
    other_loss: float = 0.0

    def __post_init__(self) -> None:
        if not self.mean:
            self.mean = [0.0] * self.size
            self.covariance = list((np.eye(self.size) * SLOPE_VARIANCE).ravel())

    @property
    def gain_nats(self) -> float:
        """What it would have saved against the simpler one."""
        return self.other_loss - self.loss

    def predict(self, inputs: list[float]) -> float:
        """Return P(good) for ``[logit of the head, 1 or 0 for a comparison, ...]``."""
        return sigmoid(inputs[0] + sum(w * x for w, x in zip(self.mean, inputs, strict=True)))

    def learn(self, inputs: list[float], target: float, other_p: float) -> None:
        """Score the forecast, then learn (one step of extended Kalman filtering on the logit)."""
        p = self.predict(inputs)
        self.num_seen += 1
        self.loss += log_loss(p, target)
        self.other_loss += log_loss(other_p, target)
        x = np.array(inputs)
        P = np.array(self.covariance).reshape(self.size, self.size)
        Px, h = P @ x, max(p * (1.0 - p), 1e-6)
        gain = Px / (1.0 / h + float(x @ Px))
        self.mean = list(np.array(self.mean) + gain * (target - p) / h)
        self.covariance = list((P - np.outer(gain, Px)).ravel())


@dataclass(slots=True)
class Calibration:
    """The forecasts, the one in use, and its reliability."""

    head: Reliability = field(default_factory=Reliability)
    used: Reliability = field(default_factory=Reliability)
    num_seen: int = 0
    num_right: float = 0.0
    head_loss: float = 0.0
    used_loss: float = 0.0
    recalibrated: Forecast = field(default_factory=lambda: Forecast(2))
    self_evaluated: Forecast = field(default_factory=lambda: Forecast(3))

    def p_good(self, head_p: float, self_p: float | None = None, *, pair: bool = False) -> float:
        """Return the calibrated probability that an answer is good (or that the first of two is better)."""
        inputs = [logit(head_p), 0.0 if pair else 1.0]
        if self_p is not None and not pair and self.uses_self_evaluation:
            return self.self_evaluated.predict([*inputs, logit(self_p)])
        return self.recalibrated.predict(inputs) if self.uses_recalibration else head_p

    @property
    def uses_recalibration(self) -> bool:
        """Whether recalibration has earned its place."""
        return self.recalibrated.gain_nats > MARGIN_NATS

    @property
    def uses_self_evaluation(self) -> bool:
        """Whether the self-evaluation has, against the best forecast without it."""
        return self.self_evaluated.gain_nats > MARGIN_NATS

    def observe(self, head_p: float, target: float, self_p: float | None = None, *, pair: bool = False) -> float:
        """Score all forecasts of a signal that is about to be learned, learn from it; return the loss in nats."""
        p, without = self.p_good(head_p, self_p, pair=pair), self.p_good(head_p, pair=pair)
        self.num_seen += 1
        self.num_right += 0.5 if p == 0.5 or target == 0.5 else float((p > 0.5) == (target > 0.5))
        self.head_loss += log_loss(head_p, target)
        self.used_loss += log_loss(p, target)
        for reliability, forecast in ((self.head, head_p), (self.used, p)):
            reliability.observe_pair(forecast) if pair else reliability.observe(forecast, target)
        inputs = [logit(head_p), 0.0 if pair else 1.0]
        self.recalibrated.learn(inputs, target, head_p)
        if self_p is not None and not pair:
            self.self_evaluated.learn([*inputs, logit(self_p)], target, without)
        return log_loss(p, target)

    def report(self) -> dict[str, object]:
        """Return what an operator wants to see."""
        n = max(self.num_seen, 1)
        return {
            "n": self.num_seen,
            "accuracy": self.num_right / n if self.num_seen else None,
            "log_loss": self.used_loss / n if self.num_seen else None,
            "ece": self.used.ece,
            "head": {"log_loss": self.head_loss / n if self.num_seen else None, "ece": self.head.ece},
            "reliability": self.used.table(),
            "recalibration": _earned(self.recalibrated, used=self.uses_recalibration),
            "self_evaluation": _earned(self.self_evaluated, used=self.uses_self_evaluation),
        }


def _earned(forecast: Forecast, *, used: bool) -> dict[str, object]:
    return {
        "used": used,
        "n": forecast.num_seen,
        "gain_nats": forecast.gain_nats,
        "slope": 1.0 + forecast.mean[0],
        "intercept": forecast.mean[1],
        "weight": forecast.mean[2] if forecast.size > 2 else None,
    }
