"""What becomes of an adapter: it is registered by its digest, judged by gates, and meets a few users or is held."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from deploy import audit, autonomy, canary, gating, head, registry, serving
from deploy.gates import GateResult
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

ACTOR = f"{audit.PLATFORM}nightly"


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

    def stand(self, found: Registrable, verification: Verification, canary_share: float | None) -> dict[str, Any]:
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
        evidence = judge.gather(
            self.sessions, self.settings, release, self.ready, self._sampler(), questions, verification
        )
        results = gating.judge(
            replace(
                evidence,
                kl=found.kl,
                num_measured=found.num_measured,
                max_kl=self.config.max_kl,
                golds_gained=found.golds_gained,
            )
        )
        self.record.set_aside.update(verification.pop_faults())
        for result in results:
            self.record.metric(phase="gates", **result.as_dict())
        with self.sessions() as session:
            registry.write_card(session, self.settings, release.name, results)
        return results

    def _sampler(self) -> Sampler:
        """Return what samples for the gates, and counts over all that it is asked.

        In an engine that was started anew the reconciler loads what is judged, as it does what is served.
        """
        num_asked = 0

        def sample(
            model: str, prompts: list[Messages], num_samples: int, seed: int, max_tokens: int | None = None
        ) -> list[list[Sample]]:
            nonlocal num_asked
            before = num_asked
            num_asked += len(prompts)
            with self.sessions() as session:
                name = serving.served_as(session, model, self.settings.need("engine_url"))
            config = self.config.model_copy(update={"max_answer_tokens": max_tokens}) if max_tokens else self.config
            return sample_served(
                self.settings,
                config,
                name,
                prompts,
                num_samples,
                seed,
                on_done=lambda done: self.record.progress(before + done),
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

    def _end(self, release: Release, share: float | None, results: list[GateResult]) -> dict[str, Any]:
        """End the run as held, or with a canary, in one transaction: none is open that no run tells of."""
        outcome: dict[str, Any] = {"release": release.name, "gates": [result.as_dict() for result in results]}
        with self.sessions.begin() as session:
            registry.lock_out_erasures(session)
            self.record.raise_if_cancelled(session)
            if reason := judge.failing(results):
                audit.write(session, actor=ACTOR, action="held", subject=release.name, reason=reason)
                return self.record.finish("held", session, reason=reason, **outcome)
            if registry.clean_ancestor(session, release.name) == release.name:
                registry.check_servable(session, self.settings, release.name)
                if head.read(session).champion != self.ready.champion:
                    raise ConflictError("The champion changed during the run.", code="head_moved")
                reason = f"{self.record.run_id} passed its gates"
                if not autonomy.may(session, self.settings, "canary"):
                    return self._left_to_an_operator(session, release, reason, outcome)
                opened = head.open_canary(
                    session,
                    challenger=release.name,
                    plan=canary.plan(session, self.settings, outcome["gates"], share),
                    gates=outcome["gates"],
                    actor=ACTOR,
                    reason=reason,
                )
                return self.record.finish("canary", session, canary_id=opened.id, **outcome)
        return self._held_for_erasure()

    def _left_to_an_operator(
        self, session: Session, release: Release, reason: str, outcome: dict[str, Any]
    ) -> dict[str, Any]:
        level = autonomy.level(session, self.settings)
        autonomy.propose(session, self.settings, "canary", release.name, actor=ACTOR, reason=reason)
        told = f"it passed its gates; at the level `{level}` an operator opens its canary"
        return self.record.finish("held", session, reason=told, code=f"autonomy_{level}", **outcome)


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
        async with EngineClient(settings.need("engine_url"), settings.engine_key) as engine:
            with suppress(EverloopError):  # it may be away, or never have loaded it
                await engine.unload_adapter(name)

    asyncio.run(unload())
