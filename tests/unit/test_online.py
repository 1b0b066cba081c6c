"""The Bayesian head: learning, unlearning, and agreement with a batch fit."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infra.errors import InvalidRequestError
from reward.online import PRIOR_VARIANCE, BayesianHead, pessimistic, sigmoid

DIM = 4
vectors = arrays(np.float64, DIM, elements=st.floats(-2, 2, allow_nan=False))
signals = st.lists(st.tuples(vectors, st.booleans(), st.floats(0.1, 1.0)), min_size=1, max_size=12)


@given(signals)
@settings(max_examples=60, deadline=None)
def test_unlearning_every_signal_returns_to_the_prior(given_signals):
    head = BayesianHead.prior(DIM)
    sites = [head.learn_one(z, float(t), w) for z, t, w in given_signals]
    for site in reversed(sites):
        head.unlearn_one(site)
    np.testing.assert_allclose(head.theta, np.zeros(DIM), atol=1e-7)
    np.testing.assert_allclose(head.covariance, PRIOR_VARIANCE * np.eye(DIM), atol=1e-7)


@given(signals, st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_a_withdrawn_signal_leaves_what_its_absence_from_the_sites_would(given_signals, which):
    head = BayesianHead.prior(DIM)
    sites = [head.learn_one(z, float(t), w) for z, t, w in given_signals]
    gone = sites[which % len(sites)]
    head.unlearn_one(gone)
    fresh = BayesianHead.prior(DIM)
    for site in sites:
        if site is not gone:
            fresh.apply(site)
    np.testing.assert_allclose(head.theta, fresh.theta, atol=1e-7)
    np.testing.assert_allclose(head.covariance, fresh.covariance, atol=1e-7)


@given(vectors, st.booleans(), st.floats(0.1, 3.0))
@settings(max_examples=60, deadline=None)
def test_one_signal_finds_the_mode_and_the_curvature_of_the_logistic_posterior(z, good, weight):
    head = BayesianHead.prior(DIM)
    head.learn_one(z, float(good), weight)
    # The gradient of log prior + log likelihood vanishes at the mode; the covariance is the inverse Hessian there.
    q = sigmoid(float(z @ head.theta))
    gradient = -head.theta / PRIOR_VARIANCE + weight * z * (float(good) - q)
    np.testing.assert_allclose(gradient, np.zeros(DIM), atol=1e-6)
    hessian = np.eye(DIM) / PRIOR_VARIANCE + weight * q * (1 - q) * np.outer(z, z)
    np.testing.assert_allclose(head.covariance @ hessian, np.eye(DIM), atol=1e-6)


@pytest.mark.parametrize(
    ("target", "weight"), [(1.5, 1.0), (-0.1, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.inf)]
)
def test_what_is_no_observation_is_refused(target, weight):
    head = BayesianHead.prior(DIM)
    before = head.digest()
    with pytest.raises(InvalidRequestError) as caught:
        head.learn_one(np.ones(DIM), target, weight)
    assert caught.value.code == "observation_out_of_range" and head.digest() == before


@pytest.mark.parametrize(
    ("m", "v", "target"), [(-8.0, 16.0, 1.0), (8.0, 16.0, 0.0), (-30.0, 400.0, 1.0), (0.5, 1e-6, 1.0)]
)
def test_the_mode_is_found_from_far_away(m, v, target):
    head = BayesianHead(np.array([m]), np.array([[v]]))
    head.learn_one(np.array([1.0]), target)
    a = float(head.theta[0])
    assert a - m == pytest.approx(v * (target - sigmoid(a)), abs=1e-6)


@given(signals)
@settings(max_examples=40, deadline=None)
def test_covariance_stays_symmetric_positive_and_shrinks(given_signals):
    head = BayesianHead.prior(DIM)
    for z, t, w in given_signals:
        before = head.predict_one(z).sd
        head.learn_one(z, float(t), w)
        assert head.predict_one(z).sd <= before + 1e-12
    np.testing.assert_allclose(head.covariance, head.covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(head.covariance).min() > 0


def test_one_pass_agrees_with_a_batch_fit():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=DIM)
    z = rng.normal(size=(2000, DIM))
    votes = rng.random(2000) < 1 / (1 + np.exp(-z @ truth))
    head = BayesianHead.prior(DIM)
    for row, vote in zip(z, votes, strict=True):
        head.learn_one(row, float(vote))
    theta = np.zeros(DIM)
    for _ in range(30):  # Newton on the whole data
        q = 1 / (1 + np.exp(-z @ theta))
        hessian = np.eye(DIM) + (z * (q * (1 - q))[:, None]).T @ z
        theta += np.linalg.solve(hessian, -theta + z.T @ (votes - q))
    # Both estimate the same mode; the standard error with n=2000 is about 0.06 per weight.
    np.testing.assert_allclose(head.theta, theta, atol=0.06)


def test_the_probability_is_the_mean_over_what_the_logit_may_be():
    head = BayesianHead(np.array([2.0]), np.array([[4.0]]))
    score = head.predict_one(np.array([1.0]))
    logits = np.random.default_rng(0).normal(2.0, 2.0, size=200_000)
    # MacKay's approximation is good to about .01 here; the standard error of the mean is .0006.
    assert score.p_good == pytest.approx(float(np.mean(1 / (1 + np.exp(-logits)))), abs=0.01)
    assert score.sd == pytest.approx(2.0)


@given(signals)
@settings(max_examples=40, deadline=None)
def test_the_scores_that_come_with_learning_are_those_before_and_after(given_signals):
    head = BayesianHead.prior(DIM)
    for z, t, w in given_signals:
        expected = [head.predict_one(z)]
        _, before, after = head.learn_scored(z, float(t), w)
        expected.append(head.predict_one(z))
        for found, asked in zip((before, after), expected, strict=True):
            np.testing.assert_allclose(
                [found.mean, found.sd, found.p_good], [asked.mean, asked.sd, asked.p_good], atol=1e-9
            )


def test_pessimistic_reward_falls_with_uncertainty_and_is_clipped():
    assert pessimistic(1.0, 2.0, 0.5) == 0.0
    assert pessimistic(1.0, 1.0, 0.5) > pessimistic(1.0, 2.0, 0.5)
    assert pessimistic(1e9, 0.0, 0.5) == 8.0
    assert math.isnan(pessimistic(math.nan, 1.0, 0.5)) and math.isnan(pessimistic(1.0, math.nan, 0.5))
    assert math.isfinite(sigmoid(-1e4))


FOLD = """
import json, sys
import numpy as np
from reward.online import BayesianHead
from threadpoolctl import ThreadpoolController
rng = np.random.default_rng(0)
head = BayesianHead.prior(577)
sites = [head.learn_one(z, float(rng.random() < 0.6)) for z in rng.normal(size=(1000, 577)) * 0.1]
for site in sites[::10]:
    head.unlearn_one(site)
head.inflate(1.2)
kernels = {lib["architecture"] for lib in ThreadpoolController().info() if lib["internal_api"] == "openblas"}
json.dump([sorted(kernels), head.theta.tolist(), head.covariance.ravel().tolist()], sys.stdout)
"""


def test_another_build_of_the_arithmetic_recovers_the_same_within_1e_9():
    # OpenBLAS has its own code for every processor: on another machine sums are taken in another order.
    builds = []
    for kernel in ("Nehalem", "Haswell"):
        environment = {**os.environ, "OPENBLAS_CORETYPE": kernel}
        ran = subprocess.run(
            [sys.executable, "-c", FOLD], env=environment, capture_output=True, text=True, check=True
        )
        builds.append(json.loads(ran.stdout))
    (one, theta, covariance), (other, other_theta, other_covariance) = builds
    if one == other:
        pytest.skip(f"this OpenBLAS knows one processor only: {one}")
    assert theta != other_theta, "the same bits: not another build"
    np.testing.assert_allclose(theta, other_theta, rtol=0, atol=1e-9)
    np.testing.assert_allclose(covariance, other_covariance, rtol=0, atol=1e-9)
