"""What becomes of an adapter: it is registered by its digest, judged by gates, and meets a few users or is held."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy import audit, gates, head, registry
from deploy.gates import GateResult
from deploy.reconciler import load_release
from deploy.store import open_store
from deploy.tables import Release
from infra.db import DATABASE_AWAY, LockLostError, Sessions
from infra.engine import EngineClient
from infra.errors import ConflictError, EverloopError
from infra.settings import Settings
from trainer import collect, judge
from trainer.config import RunConfig
from trainer.judge import Questions, Sampler
from trainer.prepared import Prepared
from trainer.recipe import Messages
from trainer.record import RunRecord
from trainer.rollout import Sample, sample_served
from trainer.training import Registrable
from trainer.verify import Verification

ACTOR = "nightly"


class Candidate:
    """An adapter that a run has trained."""

    def __init__(
        self, sessions: Sessions, settings: Settings, config: RunConfig, record: RunRecord, ready: Prepared
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.config = config
        self.record = record
        self.ready = ready

    def stand(self, found: Registrable, verification: Verification, canary_share: float) -> dict[str, Any]:
        """Register, judge, and open a canary where it passes; return how the run ended.

        Where anything fails on the way, nothing stays registered.
        """
        release = self._register(found.adapter_dir)
        if release is None:
            return self._held_for_erasure()
        try:
            results = self._judge(release, found, verification)
            return self._end(release, canary_share, results)
        except (*DATABASE_AWAY, LockLostError):  # the run goes on, here or elsewhere, and with it its release
            raise
        except Exception:
            take_back(self.record, self.settings, release.name)
            raise

    def _judge(self, release: Release, found: Registrable, verification: Verification) -> list[GateResult]:
        questions = Questions.of(self.ready.data, verification, self.config)
        self.record.phase("gates", 2 * questions.number)
        results = judge.judge(
            self.sessions, self.settings, release, self.ready, self._sampler(release.name), questions, verification
        )
        results.append(gates.kl_gate(found.kl, found.num_measured, self.config.max_kl))
        if len(found.golds_gained) > 1:
            results.append(gates.gold_gate(found.golds_gained))
        self.record.set_aside.update(verification.pop_faults())
        for result in results:
            self.record.metric(phase="gates", **result.as_dict())
        with self.sessions() as session:
            registry.write_card(session, self.settings, release.name, results)
        return results

    def _sampler(self, release: str) -> Sampler:
        """Return what samples for the gates, and counts over all that it is asked."""
        num_asked = 0

        async def restore(engine: EngineClient) -> None:
            # The head does not name it yet, so nobody else loads it into an engine that was started anew.
            if release not in await engine.models():
                await load_release(self.sessions, self.settings, engine, release)

        def sample(model: str, prompts: list[Messages], num_samples: int, seed: int) -> list[list[Sample]]:
            nonlocal num_asked
            before = num_asked
            num_asked += len(prompts)
            return sample_served(
                self.settings,
                self.config,
                model,
                prompts,
                num_samples,
                seed,
                on_done=lambda done: self.record.progress(before + done),
                restore=restore,
            )

        return sample

    def _held_for_erasure(self) -> dict[str, Any]:
        # Its signals are left to the next night, as if it had not been.
        self.record.update(last_signal_seq=None)
        return self.record.finish("held", reason="it learned from a user who was forgotten meanwhile")

    def _register(self, adapter_dir: Path) -> Release | None:
        """Return the new release, or None where somebody it learned from was forgotten meanwhile."""
        ready, data = self.ready, self.ready.data
        manifest = {
            "recipe": self.config.recipe,
            "run_id": self.record.run_id,
            "config": self.config.model_dump(),
            "dataset_digest": data.digest,
            "reward_snapshot_id": ready.snapshot_id,
            "started_from": ready.start_from,
            "num_rows": len(ready.rows.rows),
            "num_signals": data.num_signals,
            "set_aside": dict(self.record.set_aside),
        }
        with self.sessions.begin() as session:
            registry.lock_out_erasures(session)  # first: an erasure holds it when it marks the run
            self.record.raise_if_cancelled(session)
            if collect.forgotten(session, [e.episode_id for e in [*data.train, *data.gate]]):
                return None
            if registry.clean_ancestor(session, ready.start_from) != ready.start_from:
                return None
            release = registry.register(
                session, self.settings, adapter_dir, run_id=self.record.run_id, manifest=manifest
            )
            audit.write(
                session,
                actor=ACTOR,
                action="registered",
                subject=release.name,
                reason=f"trained by {self.record.run_id}",
            )
            self.record.update(session, release=release.name)
        return release

    def _end(self, release: Release, share: float, results: list[GateResult]) -> dict[str, Any]:
        """End the run as held, or with a canary, in one transaction: none is open that no run tells of."""
        outcome: dict[str, Any] = {"release": release.name, "gates": [result.as_dict() for result in results]}
        with self.sessions.begin() as session:
            registry.lock_out_erasures(session)
            self.record.raise_if_cancelled(session)
            if reason := judge.failing(results):
                return self.record.finish("held", session, reason=reason, **outcome)
            if registry.clean_ancestor(session, release.name) == release.name:
                registry.check_servable(session, self.settings, release.name)
                if head.read(session).champion != self.ready.champion:
                    raise ConflictError("The champion changed during the run.", code="head_moved")
                canary = head.open_canary(
                    session,
                    challenger=release.name,
                    share=share,
                    alpha=self.settings.canary_alpha,
                    gates=outcome["gates"],
                    actor=ACTOR,
                    reason=f"{self.record.run_id} passed its gates",
                )
                return self.record.finish("canary", session, canary_id=canary.id, **outcome)
        return self._held_for_erasure()


def take_back(record: RunRecord, settings: Settings, name: str) -> None:
    """Undo the registration of a run's release that was not judged to the end; nobody has met it."""
    with record.sessions.begin() as session:
        digest = registry.take_back(session, name, record.run_id)
        if digest is None:
            return
        record.update(session, release=None)
        reason = f"{record.run_id} ended before its gates did"
        audit.write(session, actor=ACTOR, action="taken_back", subject=name, reason=reason)
    with suppress(EverloopError):  # a store that is away keeps files that nothing names; `releases prune` tells
        open_store(settings).delete(digest)

    async def unload() -> None:
        async with EngineClient(settings.need("engine_url")) as engine:
            with suppress(EverloopError):  # it may be away, or never have loaded it
                await engine.unload_adapter(name)

    asyncio.run(unload())
