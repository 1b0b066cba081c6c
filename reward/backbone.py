"""The slower learner of the reward model: a LoRA backbone, trained now and then on all comparisons.

Its features replace the active ones only if they win a contest on the newest comparisons, which it has never seen.
Every step is committed before the next begins, so a run that was killed is finished by the next start, or begun
anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from infra.db import Sessions, advisory_lock
from infra.errors import ConflictError, InvalidRequestError
from infra.settings import Settings
from reward import encoders, feature_cache, store
from reward.backbone_config import BackboneConfig
from reward.contest import Contest, compare, num_newest
from reward.encoder import Encoder, open_encoder
from reward.feature_cache import Answer, answers_concerned
from reward.judged import Judged, collect_pairs, pairs_digest
from reward.kinds import GUESSES
from reward.tables import Features, RewardEncoder

log = logging.getLogger("everloop.reward")

Result = dict[str, Any]


def run(
    sessions: Sessions,
    settings: Settings,
    config: BackboneConfig,
    on_phase: Callable[[str], None] = log.info,
    num_threads: int | None = None,
) -> Result:
    """Train a backbone on what was said so far, judge it, and activate it if it wins.

    Parameters
    ----------
    on_phase
        Told in a sentence what is being done.
    num_threads
        Threads that torch may use; its own choice, if unset.

    Returns
    -------
    dict
        ``status`` (skipped, rejected or activated), ``reason``, ``num_pairs``; where one was judged also
        ``encoder``, ``training`` and ``contest``.

    Raises
    ------
    ConflictError
        Code ``backbone_in_progress``.
    """
    with advisory_lock(sessions, "reward-backbone") as held:
        if not held:
            raise ConflictError("Another run trains a reward backbone.", code="backbone_in_progress")
        return _Run(sessions, settings, config, on_phase, num_threads).steps()


class _Run:
    def __init__(
        self,
        sessions: Sessions,
        settings: Settings,
        config: BackboneConfig,
        on_phase: Callable[[str], None],
        num_threads: int | None,
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.config = config
        self.on_phase = on_phase
        self.num_threads = num_threads

    def steps(self) -> Result:
        with self.sessions.begin() as session:
            encoders.sweep(session, self.settings.backbones_dir)
            pairs = collect_pairs(session)
            active = encoders.open_active_encoder(session, self.settings, self.num_threads)
        least = self.settings.min_backbone_pairs
        if len(pairs) < least:
            return _skipped(pairs, f"{len(pairs)} comparisons; min_backbone_pairs is {least}")
        num_judged = num_newest(len(pairs))
        trained = self._trainable(pairs, num_judged)
        if not trained:
            return _skipped(pairs, f"all {len(pairs)} comparisons are kept to judge by")
        row = self._candidate(trained)
        if row.status != "candidate":
            return _skipped(pairs, f"nothing new since {row.name} was judged ({row.status})")
        return self._judge(pairs, num_judged, active, row)

    def _trainable(self, pairs: Sequence[Judged], num_judged: int) -> list[Judged]:
        """Return the older pairs that share no answer with those that judge, the newest of them."""
        kept = {digest for pair in pairs[len(pairs) - num_judged :] for digest in _digests(pair)}
        older = [p for p in pairs[: len(pairs) - num_judged] if kept.isdisjoint(_digests(p))]
        return older[-self.config.max_pairs :]

    def _candidate(self, trained: Sequence[Judged]) -> RewardEncoder:
        """Return the backbone of this data: an earlier run's, or a new one."""
        digest = self._training_digest(trained)
        with self.sessions.begin() as session:
            known = encoders.trained_on(session, digest)
            left = sa.select(RewardEncoder.name).where(RewardEncoder.status == "candidate")
            stale = [name for name in session.scalars(left) if known is None or name != known.name]
            encoders.reject(session, stale, {"reason": "newer comparisons came before it was judged"})
        return known or self._train(trained, digest)

    def _train(self, trained: Sequence[Judged], digest: str) -> RewardEncoder:
        from reward.backbone_training import train

        self.on_phase(f"training a backbone on {len(trained)} comparisons")
        backbones_dir = self.settings.backbones_dir
        backbones_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=backbones_dir, prefix=".training-") as work_dir:
            adapter_dir, facts = train(
                self.settings.base_model_dir,
                self.settings.encoder_layer,
                trained,
                self.config,
                Path(work_dir),
                self.num_threads,
            )
            path, adapter = encoders.keep_adapter(adapter_dir, backbones_dir)
        name = encoders.open_backbone(self.settings, path, adapter).name
        training = {
            "digest": digest,
            "config": self.config.model_dump(),
            "feedback_ids": sorted({feedback_id for pair in trained for feedback_id in pair.feedback_ids}),
            **facts,
        }
        with self.sessions.begin() as session:
            encoders.add_candidate(session, name, path, adapter, training)
            return session.get_one(RewardEncoder, name)

    def _training_digest(self, trained: Sequence[Judged]) -> str:
        base = open_encoder(self.settings).name
        text = json.dumps([base, self.config.model_dump(), pairs_digest(trained)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _judge(self, pairs: list[Judged], num_judged: int, active: Encoder, row: RewardEncoder) -> Result:
        assert row.adapter_path and row.adapter_digest, "only backbones are candidates"
        candidate = encoders.open_backbone(
            self.settings, Path(row.adapter_path), row.adapter_digest, self.num_threads
        )
        self.on_phase(f"judging {candidate.name} against {active.name}")
        result = {"num_pairs": len(pairs), "encoder": row.name, "training": _facts(row)}
        try:
            contest = self._contest(pairs, num_judged, active, candidate)
        except InvalidRequestError as error:
            return result | self._rejected(row.name, {"reason": error.message})
        evaluation = {"contest": contest.as_dict(), "reason": contest.reason}
        if contest.verdict != "win":
            return result | self._rejected(row.name, evaluation)
        self.on_phase(f"{candidate.name} won; computing the features of all answers that signals concern")
        with self.sessions() as session:
            answers = answers_concerned(session)
        feature_cache.fill(self.sessions, candidate, answers)
        return result | self._activated(row, active, evaluation)

    def _contest(self, pairs: list[Judged], num_judged: int, active: Encoder, candidate: Encoder) -> Contest:
        answers = [answer for pair in pairs for answer in _answers(pair)]
        found = []
        for encoder in (active, candidate):
            feature_cache.fill(self.sessions, encoder, answers)
            with self.sessions() as session:
                found.append(store.cached_features(session, encoder.name, {a.digest for a in answers}))
        # What one of them could not read, or what was erased meanwhile, counts for neither.
        first_judged = len(pairs) - num_judged
        usable_rows = [n for n, p in enumerate(pairs) if all(d in phis for d in _digests(p) for phis in found)]
        weights = np.array([GUESSES["correction"] if pairs[n].kind == "correction" else 1.0 for n in usable_rows])
        used = [pairs[n] for n in usable_rows]
        return compare(
            (active.name, _differences(used, found[0], active.dim)),
            (candidate.name, _differences(used, found[1], candidate.dim)),
            weights,
            sum(n >= first_judged for n in usable_rows),
        )

    def _rejected(self, name: str, evaluation: dict[str, Any]) -> Result:
        with self.sessions.begin() as session:
            encoders.reject(session, [name], evaluation)
            session.execute(sa.delete(Features).where(Features.encoder == name))
        return {"status": "rejected", **evaluation}

    def _activated(self, row: RewardEncoder, active: Encoder, evaluation: dict[str, Any]) -> Result:
        with self.sessions.begin() as session:
            if encoders.activate(session, row.name, active, evaluation):
                return {"status": "activated", **evaluation}
        reason = "it learned from a user who was forgotten meanwhile"
        return self._rejected(row.name, {**evaluation, "reason": reason})


def _skipped(pairs: Sequence[Judged], reason: str) -> Result:
    return {"status": "skipped", "reason": reason, "num_pairs": len(pairs)}


def _facts(row: RewardEncoder) -> dict[str, Any]:
    """Return what the training came to, without the long list of what it was trained on."""
    return {name: value for name, value in row.evaluation["training"].items() if name != "feedback_ids"}


def _answers(pair: Judged) -> tuple[Answer, Answer]:
    return (
        Answer(pair.messages, pair.chosen, pair.episode_ids[0]),
        Answer(pair.messages, pair.rejected, pair.episode_ids[1]),
    )


def _digests(pair: Judged) -> tuple[str, str]:
    chosen, rejected = _answers(pair)
    return chosen.digest, rejected.digest


def _differences(pairs: Sequence[Judged], phis: Mapping[str, NDArray[np.float64]], dim: int) -> NDArray[np.float64]:
    """Return the features of the chosen answers minus those of the rejected, shape ``(n, dim)``."""
    rows = [phis[chosen] - phis[rejected] for chosen, rejected in map(_digests, pairs)]
    return np.array(rows).reshape(len(pairs), dim)
