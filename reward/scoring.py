"""Scores of answers that nobody has recorded, with what each part of the features contributes; the RL reward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.db import Sessions, transaction
from infra.errors import NotFoundError
from reward import store
from reward.encoder import Answer, Encoder
from reward.history import Posterior
from reward.learner import Guards, abstains
from reward.online import BayesianHead, Score, pessimistic
from reward.state import read_guards
from reward.tables import RewardSnapshot

Matrix = NDArray[np.float64]


def contributions(encoder: Encoder, head: BayesianHead, z: Matrix) -> list[dict[str, float]]:
    """Return what each part of the features adds to the mean of the logit; the parts sum to it.

    Parameters
    ----------
    z
        Features, or differences of features, shape ``(n, dim)``.
    """
    parts = encoder.layout.slices
    return [{name: float(row[part] @ head.theta[part]) for name, part in parts.items()} for row in z]


class Scorer:
    """Scores answers under the newest posterior, or under a pinned snapshot of it.

    Parameters
    ----------
    encoder
        Returns the encoder that is active now.
    kappa
        Standard deviations taken off a reward.

    Safe to call from several threads; features are computed one request at a time.
    """

    def __init__(self, sessions: Sessions, encoder: Callable[[], Encoder], kappa: float) -> None:
        self.sessions = sessions
        self._encoder = encoder
        self.kappa = kappa
        self._lock = threading.Lock()
        self._known: tuple[str, Posterior] | None = None

    def score(
        self, answers: Sequence[Answer], references: Sequence[str | None], snapshot_id: int | None = None
    ) -> dict[str, Any]:
        """Return the scores of answers, each by itself or against a reference answer to the same messages.

        Raises
        ------
        UnusableAnswerError
            Where no features can be made of an answer or reference.
        NotFoundError
            Code ``snapshot_not_found``.
        """
        texts = [*answers, *((answers[i][0], r) for i, r in enumerate(references) if r is not None)]
        encoder = self._encoder()
        with self._lock:
            posterior, guards = self._state(encoder, snapshot_id)
            phi = encoder.encode(texts).astype(np.float64)
            z = phi[: len(answers)].copy()
            behind = iter(phi[len(answers) :])
            for i, reference in enumerate(references):
                if reference is not None:
                    z[i] -= next(behind)
            found = posterior.head.predict_many(z)
            shares = contributions(encoder, posterior.head, z)
        rows = zip(found, shares, references, strict=True)
        return {
            "encoder": encoder.name,
            "update_seq": posterior.update_seq,
            "snapshot_id": snapshot_id,
            "kappa": self.kappa,
            "data": [self._row(guards, score, share, pair=ref is not None) for score, share, ref in rows],
        }

    def _row(self, guards: Guards, score: Score, share: dict[str, float], *, pair: bool) -> dict[str, Any]:
        return {
            "mean": score.mean,
            "sd": score.sd,
            "p_good": guards.calibration.p_good(score.p_good, pair=pair),
            "abstain": abstains(score.sd, guards.usual_sd),
            "reward": pessimistic(score.mean, score.sd, self.kappa),
            "contributions": share,
        }

    def _state(self, encoder: Encoder, snapshot_id: int | None) -> tuple[Posterior, Guards]:
        with transaction(self.sessions) as session:
            guards = read_guards(session, encoder.name)
            if snapshot_id is not None:
                snapshot = session.get(RewardSnapshot, snapshot_id)
                if snapshot is None or snapshot.encoder != encoder.name:
                    raise NotFoundError(
                        f"There is no reward snapshot {snapshot_id} of {encoder.name}.",
                        code="snapshot_not_found",
                        param="snapshot_id",
                    )
                return store.read_snapshot(snapshot), guards
            known = self._known[1] if self._known and self._known[0] == encoder.name else None
            posterior = store.load_posterior(session, encoder.name, encoder.dim, known)
            self._known = encoder.name, posterior
            return posterior, guards
