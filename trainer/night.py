"""One night: freeze what people said, sample, score, pair, train, register, judge, open a canary.

Each step reads and writes the run's row, so a page, a terminal and a restart see the same progress.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from deploy import attest, audit, gates, head, registry
from deploy.gates import GateResult
from deploy.reconciler import load_release
from deploy.tables import Release
from infra.db import Sessions, advisory_lock
from infra.engine import EngineClient
from infra.errors import ConflictError, EverloopError
from infra.settings import Settings
from reward import store
from reward.encoder import base_model_digest
from reward.encoders import open_active_encoder
from reward.style import num_words
from trainer import erasure, pairs, snapshot
from trainer.config import OnlineDPOConfig
from trainer.pairs import PairSet
from trainer.record import RunRecord
from trainer.redactor import Redactor
from trainer.rollout import Sample, sample
from trainer.scoring import PinnedReward
from trainer.snapshot import Snapshot
from trainer.tables import TrainingRun

log = logging.getLogger("everloop.night")
RECIPE = "online-dpo"
ACTOR = "nightly"
MIN_PAIRS = 8


class Night:
    """A run in progress.

    Parameters
    ----------
    canary_share
        Share of users who meet the candidate.
    """

    def __init__(
        self, sessions: Sessions, settings: Settings, config: OnlineDPOConfig, canary_share: float
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.config = config
        self.canary_share = canary_share
        self.record = RunRecord(sessions, settings.runs_dir)

    def run(self) -> dict[str, Any]:
        """Run the night to its end.

        Returns
        -------
        dict
            ``run_id``, ``status`` (canary, held or skipped), and why.

        Raises
        ------
        ConflictError
            Code ``run_in_progress`` where another run holds the lock.
        """
        with advisory_lock(self.sessions, "training") as held:
            if not held:
                raise ConflictError("Another training run is in progress.", code="run_in_progress")
            self.record.create(RECIPE, self.config.model_dump())
            try:
                return self._steps()
            except BaseException as error:
                # The reason is shown to users; what an exception quotes (paths, addresses, data) is for the log.
                log.exception("%s failed", self.record.run_id)
                message = error.message if isinstance(error, EverloopError) else type(error).__name__
                self.record.end("failed", {"reason": message})
                raise
            finally:
                shutil.rmtree(self.record.run_dir / "checkpoints", ignore_errors=True)
                erasure.sweep(self.sessions, self.settings.runs_dir)

    def _held_for_erasure(self) -> dict[str, Any]:
        # Its signals are left to the next night, as if it had not been.
        self.record.update(last_signal_seq=None)
        return self.record.finish("held", reason="it learned from a user who was forgotten meanwhile")

    def _steps(self) -> dict[str, Any]:
        self.record.phase("snapshot", 1)
        with self.sessions.begin() as session:
            current = head.read(session)
            if current.canary_id is not None:
                return self.record.finish("skipped", reason=f"canary {current.canary_id} is still open")
            seen = session.scalar(
                sa.select(sa.func.max(TrainingRun.last_signal_seq)).where(
                    TrainingRun.status.in_(["canary", "held"])
                )
            )
            data = snapshot.take(session, Redactor.from_settings(self.settings), after_seq=seen or 0)
            start_from = registry.clean_ancestor(session, current.champion)
        self.record.set_aside.update(data.set_aside)
        self.record.update(last_signal_seq=data.last_signal_seq)
        must_retrain = start_from != current.champion  # the champion learned from somebody who was forgotten
        if data.num_new_signals < self.settings.min_new_signals and not must_retrain:
            return self.record.finish(
                "skipped",
                reason=f"{data.num_new_signals} new signals; min_new_signals is {self.settings.min_new_signals}",
            )
        data.save(self.record.run_dir / snapshot.DATASET_FILE)
        with self.sessions.begin() as session:
            encoder = open_active_encoder(session, self.settings)
            snapshot_id, posterior = store.pin_snapshot(session, encoder.name, encoder.dim)
            self.record.note_inputs(session, data, snapshot_id)

        reward = PinnedReward(encoder, posterior, self.settings.pessimism_kappa)
        found = self._make_pairs(data, reward, current.champion)
        if len(found.pairs) < MIN_PAIRS:
            return self.record.finish("held", reason=f"only {len(found.pairs)} pairs had a clear winner")
        adapter_dir = self._train(found, start_from)
        release = self._register(adapter_dir, data, snapshot_id, start_from, len(found.pairs))
        if release is None:
            return self._held_for_erasure()
        results = self._judge(data, reward, current.champion, release)
        return self._open_canary(release, current.champion, results)

    def _make_pairs(self, data: Snapshot, reward: PinnedReward, champion: str) -> PairSet:
        # One example per prompt, the newest; a seeded choice where there are more than fit.
        by_prompt = {json.dumps(e.messages): e for e in data.train}
        examples = list(by_prompt.values())
        random.Random(self.config.seed).shuffle(examples)
        examples = examples[: self.config.num_prompts]
        prompts = [e.messages for e in examples]
        self.record.phase("sample", len(prompts))
        samples = asyncio.run(self._sample(champion, prompts, self.config.samples_per_prompt, seed=1))
        self.record.phase("score", sum(len(group) for group in samples) + len(prompts))
        rewards = reward.score(
            prompts,
            [[s.text for s in group] for group in samples],
            [e.answer for e in examples],
            self.record.progress,
        )
        low, high = data.well_rated_words()
        found = pairs.best_against_worst(
            prompts, samples, rewards, min_margin=self.config.min_margin, words_range=(low, high)
        )
        corrected = pairs.corrections(data.train, self.config.max_corrections)
        from_samples = found.pairs[: max(self.config.max_pairs - len(corrected.pairs), 0)]
        found.set_aside["pairs_over_budget"] = len(found.pairs) - len(from_samples)
        found.pairs = corrected.pairs + from_samples
        self.record.set_aside.update(+(found.set_aside + corrected.set_aside))
        self.record.metric(
            phase="pairs",
            from_samples=len(from_samples),
            from_corrections=len(corrected.pairs),
            words_range=[low, high],
            set_aside=dict(self.record.set_aside),
        )
        return found

    async def _sample(
        self, model: str, prompts: list[list[dict[str, Any]]], num_samples: int, seed: int
    ) -> list[list[Sample]]:
        url = self.settings.need("engine_url")
        async with EngineClient(url, timeout_s=self.settings.engine_timeout_s) as engine:
            return await sample(
                engine,
                model,
                prompts,
                num_samples=num_samples,
                max_tokens=self.config.max_answer_tokens,
                temperature=self.config.temperature,
                seed=self.config.seed + seed,
                on_done=self.record.progress,
            )

    def _train(self, found: PairSet, champion: str) -> Path:
        from trainer import online_dpo

        with self.sessions() as session:
            digest = registry.get_release(session, champion).adapter_digest
            start_from = registry.verified_path(session, digest) if digest else None
        self.record.phase("train", max(1, round(len(found.pairs) * self.config.epochs / self.config.batch_pairs)))
        return online_dpo.train(
            self.settings.base_model_dir,
            start_from,
            found.pairs,
            self.config,
            self.record.run_dir,
            self.record.progress,
        )

    def _register(
        self, adapter_dir: Path, data: Snapshot, snapshot_id: int, start_from: str, num_pairs: int
    ) -> Release | None:
        manifest = {
            "base_digest": base_model_digest(self.settings.base_model_dir),
            "recipe": RECIPE,
            "run_id": self.record.run_id,
            "config": self.config.model_dump(),
            "dataset_digest": data.digest,
            "reward_snapshot_id": snapshot_id,
            "started_from": start_from,
            "num_pairs": num_pairs,
            "num_signals": data.num_signals,
            "set_aside": dict(self.record.set_aside),
        }
        with self.sessions.begin() as session:
            registry.lock_out_erasures(session)
            if snapshot.forgotten(session, [e.episode_id for e in [*data.train, *data.gate]]):
                return None
            if registry.clean_ancestor(session, start_from) != start_from:
                return None
            release = registry.register(
                session, adapter_dir, self.settings.adapters_dir, run_id=self.record.run_id, manifest=manifest
            )
            audit.write(
                session,
                actor=ACTOR,
                action="registered",
                subject=release.name,
                reason=f"trained by {self.record.run_id}",
            )
        self.record.update(release=release.name)
        return release

    def _judge(self, data: Snapshot, reward: PinnedReward, champion: str, release: Release) -> list[GateResult]:
        examples = list({json.dumps(e.messages): e for e in data.gate}.values())[-self.config.num_gate_prompts :]
        prompts = [e.messages for e in examples]
        self.record.phase("gates", 2 * len(prompts))
        probe = asyncio.run(self._attest(release, champion))
        new = asyncio.run(self._sample(release.name, prompts, 1, seed=2))
        old = asyncio.run(self._sample(champion, prompts, 1, seed=3))
        references = [e.answer for e in examples]
        scores = [
            [group[0] for group in reward.score(prompts, [[s.text for s in g] for g in answers], references)]
            if prompts
            else []
            for answers in (new, old)
        ]
        low, high = data.well_rated_words(tail=0.0)
        results = [
            gates.attestation_gate("base", probe.differs_from_base, len(probe.probe)),
            gates.attestation_gate("champion", probe.differs_from_champion, len(probe.probe)),
            gates.win_rate_gate(scores[0], scores[1]),
            gates.length_gate([num_words(g[0].text) for g in new], low, max(high, _median_words(old))),
        ]
        for result in results:
            self.record.metric(phase="gates", **result.as_dict())
        return results

    async def _attest(self, release: Release, champion: str) -> attest.ProbeResult:
        url = self.settings.need("engine_url")
        async with EngineClient(url, timeout_s=self.settings.engine_timeout_s) as engine:
            if release.name not in await engine.models():
                await load_release(self.sessions, engine, release.name)
            result = await attest.compare(engine, release.name, champion)
        with self.sessions.begin() as session:
            attest.save(session, release, url, result)
        return result

    def _open_canary(self, release: Release, champion: str, results: list[GateResult]) -> dict[str, Any]:
        judged = [result.as_dict() for result in results]
        verdict = gates.overall(results)
        if verdict != "pass":
            failing = ", ".join(r.gate for r in results if r.verdict != "pass")
            return self.record.finish(
                "held", release=release.name, gates=judged, reason=f"gates {verdict}: {failing}"
            )
        with self.sessions.begin() as session:
            registry.lock_out_erasures(session)
            if registry.clean_ancestor(session, release.name) != release.name:
                return self._held_for_erasure()
            if head.read(session).champion != champion:
                raise ConflictError("The champion changed during the run.", code="head_moved")
            canary = head.open_canary(
                session,
                challenger=release.name,
                share=self.canary_share,
                alpha=self.settings.canary_alpha,
                gates=judged,
                actor=ACTOR,
                reason=f"{self.record.run_id} passed its gates",
            )
            canary_id = canary.id
        self.record.update(canary_id=canary_id)
        return self.record.finish("canary", release=release.name, gates=judged, canary_id=canary_id)


def _median_words(groups: list[list[Sample]]) -> float:
    ordered = sorted(num_words(group[0].text) for group in groups)
    return float(ordered[len(ordered) // 2]) if ordered else 0.0
