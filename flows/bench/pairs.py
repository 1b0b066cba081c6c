"""Preference pairs from a file: their features, one pass over them, and a batch fit beside it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from infra import report
from infra.errors import InvalidRequestError
from infra.settings import Settings
from reward.calibration import Reliability, log_loss
from reward.encoder import Answer, Encoder
from reward.online import PRIOR_VARIANCE, BayesianHead

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

SKIPPED_SHARE = 0.25  # predictions of the first quarter are not counted
SWAP_SEEDS = 5
FOLDS = (3, 10)  # the one pass has on average seen as much as three folds leave to learn from
REFIT_EVERY = 8
_TURN = re.compile(r"\n\n(Human|Assistant):")


def transcript(text: str) -> Answer:
    """Return (messages, last answer) of a transcript of ``Human:`` and ``Assistant:`` turns."""
    parts = _TURN.split(text)[1:]
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not turns or turns[-1]["role"] != "assistant":
        raise InvalidRequestError("A transcript must end with an Assistant turn.", code="bad_transcript")
    return turns[:-1], turns[-1]["content"]


def read_pairs(path: Path) -> list[tuple[Answer, Answer]]:
    """Return the (chosen, rejected) answers of a gzip'd JSONL file, in file order.

    Raises
    ------
    InvalidRequestError
        Code ``bad_pairs``: the line is named.
    """
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found.append((transcript(row["chosen"]), transcript(row["rejected"])))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequestError(f"{path.name}, line {number}: {error}", code="bad_pairs") from error
    return found


def differences(settings: Settings, encoder: Encoder, path: Path) -> Matrix:
    """Return chosen minus rejected features, shape ``(pairs, dim)``; computed once and kept under the home.

    An answer of which no features can be made (an empty one) counts as the zero vector.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    kept = settings.home / "bench" / f"{digest}-{encoder.name}.npy"
    if not kept.exists():
        answers = [answer for pair in read_pairs(path) for answer in pair]
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, encode(encoder, answers, "features of the pairs"))
    phi: Matrix = np.load(kept).astype(np.float64)
    return phi[0::2] - phi[1::2]


def encode(encoder: Encoder, answers: Sequence[Answer], what: str) -> NDArray[np.float32]:
    """Return features, shape ``(n, dim)``; zeros where none can be made."""
    with report.Phase(what, len(answers)) as phase:
        return encoder.encode_usable(answers, phase.update)[0]


def one_pass(z: Matrix, targets: Sequence[float], *, pairs: bool) -> dict[str, float]:
    """Predict each observation, then learn it; return accuracy, log loss and ECE after the first quarter."""
    head, forecasts = BayesianHead.prior(z.shape[1]), []
    for row, target in zip(z, targets, strict=True):
        forecasts.append(head.learn_scored(row, target)[1].p_good)
    counted = slice(int(len(forecasts) * SKIPPED_SHARE), None)
    return scores(forecasts[counted], targets[counted], pairs=pairs)


def scores(forecasts: Sequence[float], targets: Sequence[float], *, pairs: bool) -> dict[str, float]:
    """Return n, accuracy, log loss and ECE of forecasts.

    Of a pair it says nothing which side is named first: `ece` counts it both ways. `ece_swapped` is the mean over
    random choices of one side, and `ece_by_luck` what `ece_swapped` would be if every forecast were exactly right.
    """
    p, t = np.array(forecasts), np.array(targets)
    reliability = Reliability()
    for forecast, target in zip(forecasts, targets, strict=True):
        reliability.observe_pair(forecast) if pairs else reliability.observe(forecast, target)
    found = {
        "n": float(len(p)),
        "accuracy": float(np.mean(np.where(p == 0.5, 0.5, (p > 0.5) == (t > 0.5)))),
        "log_loss": float(np.mean([log_loss(a, b) for a, b in zip(forecasts, targets, strict=True)])),
        "ece": float(reliability.ece or 0.0),
    }
    if pairs:
        found["ece_swapped"] = float(np.mean([_swapped(p, seed) for seed in range(SWAP_SEEDS)]))
        found["ece_by_luck"] = float(np.mean([_by_luck(p, seed) for seed in range(40)]))
    return found


def batch_accuracy(z: Matrix) -> dict[str, float]:
    """Return the accuracy of batch fits on what the one pass is judged on.

    ``batch_accuracy``: in time, refitted every few pairs on what came before, as much as the one pass has seen.
    ``batch_K_fold``: shuffled folds, each predicted from all the others, that is also from later ones.
    """
    first = int(len(z) * SKIPPED_SHARE)
    found = {}
    with report.Phase("batch fits", len(z) - first + len(FOLDS)) as phase:
        ahead = np.zeros(len(z))
        for start in range(first, len(z), REFIT_EVERY):
            ahead[start : start + REFIT_EVERY] = z[start : start + REFIT_EVERY] @ _fit(z[:start])
            phase.update(start - first)
        found["batch_accuracy"] = float(np.mean(ahead[first:] > 0))
        for number, num_folds in enumerate(FOLDS):
            phase.update(len(z) - first + number)
            folds = _cross_validated(z, num_folds)
            found[f"batch_{num_folds}_fold"] = float(np.mean(folds[first:] > 0))
    return found


def _cross_validated(z: Matrix, num_folds: int) -> Vector:
    """Return the logit of each pair, from a fit on the folds that it is not in."""
    logits = np.zeros(len(z))
    order = np.random.default_rng(0).permutation(len(z))
    for fold in range(num_folds):
        held_out = order[fold::num_folds]
        logits[held_out] = z[held_out] @ _fit(np.delete(z, held_out, axis=0))
    return logits


def _fit(z: Matrix) -> Vector:
    """Return the mode of the logistic posterior on pairs that all came out first over second."""

    def loss(theta: Vector) -> tuple[float, Vector]:
        m = z @ theta
        gradient = -z.T @ (1.0 / (1.0 + np.exp(np.clip(m, -30.0, 30.0)))) + theta / PRIOR_VARIANCE
        return float(np.logaddexp(0.0, -m).sum() + theta @ theta / (2.0 * PRIOR_VARIANCE)), gradient

    found: Any = minimize(loss, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x)


def _swapped(p: Vector, seed: int) -> float:
    first = np.random.default_rng(seed).random(len(p)) < 0.5
    return _ece(np.where(first, p, 1.0 - p), first.astype(float))


def _by_luck(p: Vector, seed: int) -> float:
    rng = np.random.default_rng(1_000 + seed)
    right, first = rng.random(len(p)) < p, rng.random(len(p)) < 0.5
    return _ece(np.where(first, p, 1.0 - p), (right == first).astype(float))


def _ece(p: Vector, y: Vector) -> float:
    reliability = Reliability()
    for forecast, outcome in zip(p, y, strict=True):
        reliability.observe(float(forecast), float(outcome))
    return reliability.ece or 0.0
