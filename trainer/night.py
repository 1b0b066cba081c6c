"""One run: freeze what people said, make rows, train, register, judge, open a canary.

Each step reads and writes the run's row, so a page, a terminal and a restart see the same progress. A run that was
killed in its training goes on from its last checkpoint when the next one starts.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from deploy import head, registry
from deploy.runs import TrainingRun
from infra.db import Sessions, advisory_lock
from infra.errors import ConflictError, EverloopError
from infra.settings import Settings
from reward import store
from reward.encoders import open_active_encoder
from trainer import collect, erasure, prepared
from trainer.candidate import Candidate
from trainer.checkpoints import CHECKPOINTS_DIR, KEPT_DIR
from trainer.failures import explained
from trainer.fit import fitting
from trainer.material import material_of
from trainer.prepared import Prepared
from trainer.recipe import UnusableDataError, resolve
from trainer.record import RunRecord
from trainer.redactor import Redactor
from trainer.scoring import PinnedReward
from trainer.training import Training
from trainer.verify import Verification

log = logging.getLogger("everloop.night")


class Night:
    """A run in progress.

    Parameters
    ----------
    given
        The recipe and its settings, as far as they differ from the defaults.
    canary_share
        Share of users who meet the candidate.

    Raises
    ------
    InvalidRequestError
        Codes ``recipe_unknown`` and ``config_invalid``; nothing has begun.
    """

    def __init__(
        self, sessions: Sessions, settings: Settings, given: Mapping[str, Any], canary_share: float
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.recipe, self.config = resolve(given)
        self.canary_share = canary_share
        self.verification = Verification(self.config.verifiers, self.config.verifier_timeout_s)
        self.record = RunRecord(sessions, settings.runs_dir)

    def run(self) -> dict[str, Any]:
        """Run to the end; first of all, a run that was killed.

        Returns
        -------
        dict
            ``run_id``, ``status`` (canary, held or skipped), and why.

        Raises
        ------
        ConflictError
            Code ``run_in_progress`` where another run holds the lock.
        TrainingError
            Where the training came to nothing.
        """
        with advisory_lock(self.sessions, "training") as held:
            if not held:
                raise ConflictError("Another training run is in progress.", code="run_in_progress")
            interrupted = self._interrupted()
            if interrupted is None:
                self.record.create(self.config)
            try:
                return self._steps(interrupted)
            except BaseException as error:
                # The reason is shown to users; what an exception quotes (paths, addresses, data) is for the log.
                log.exception("%s failed", self.record.run_id)
                known = explained(error)
                is_cancelled = known is not None and known.code == "run_cancelled"
                reason = known.message if known else type(error).__name__
                self.record.end("cancelled" if is_cancelled else "failed", {"reason": reason})
                if known is not None and known is not error:
                    raise known from error
                raise
            finally:
                self.verification.close()
                shutil.rmtree(self.record.run_dir / KEPT_DIR, ignore_errors=True)
                prepared.discard(self.record.run_dir)
                shutil.rmtree(self.record.run_dir / CHECKPOINTS_DIR, ignore_errors=True)
                erasure.sweep(self.sessions, self.settings.datasets_dir)

    def _interrupted(self) -> Prepared | None:
        """Return what a killed run was training on, and take its record over; other dead runs have failed."""
        with self.sessions.begin() as session:
            dead = session.scalars(sa.select(TrainingRun).where(TrainingRun.status == "running")).all()
            for run in dead:
                try:
                    found = prepared.load(session, self.settings, run)
                except EverloopError as error:
                    run.status, run.ended_at = "failed", sa.func.now()
                    run.result = {"reason": f"the process died. {error.message}"}
                    prepared.discard(self.settings.runs_dir / run.id)
                    continue
                self.recipe, self.config = resolve(run.config)
                self.verification = Verification(self.config.verifiers, self.config.verifier_timeout_s)
                self.record.take_over(run.id)
                return found
        return None

    def _steps(self, interrupted: Prepared | None) -> dict[str, Any]:
        ready = interrupted or self._prepare()
        if not isinstance(ready, Prepared):
            return ready
        self.record.set_aside.update(ready.data.set_aside)
        self.record.set_aside.update(ready.rows.set_aside)
        training = Training(
            self.sessions, self.settings, self.recipe, self.config, self.record, ready, self.verification
        )
        adapter_dir, measured = training.run()
        candidate = Candidate(self.sessions, self.settings, self.config, self.record, ready)
        return candidate.stand(adapter_dir, measured, self.verification, self.canary_share)

    def _prepare(self) -> Prepared | dict[str, Any]:
        """Return what is trained on; or how the run ended, where there is nothing."""
        self.record.phase("snapshot", 1)
        with self.sessions.begin() as session:
            through = collect.settled_seq(session)
        with self.sessions.begin() as session:
            current = head.read(session)
            if current.canary_id is not None:
                return self.record.finish("skipped", reason=f"canary {current.canary_id} is still open")
            seen = session.scalar(
                sa.select(sa.func.max(TrainingRun.last_signal_seq)).where(
                    TrainingRun.status.in_(["canary", "held"])
                )
            )
            redactor = Redactor.from_settings(self.settings)
            data = collect.take(session, redactor, after_seq=seen or 0, through_seq=through)
            start_from = registry.clean_ancestor(session, current.champion)
        self.record.update(last_signal_seq=data.last_signal_seq)
        must_retrain = start_from != current.champion  # the champion learned from somebody who was forgotten
        if data.num_new_signals < self.settings.min_new_signals and not must_retrain:
            return self.record.finish(
                "skipped",
                reason=f"{data.num_new_signals} new signals; min_new_signals is {self.settings.min_new_signals}",
            )
        data.save(self.settings.datasets_dir)
        with self.sessions.begin() as session:
            encoder = open_active_encoder(session, self.settings)
            snapshot_id, posterior = store.pin_snapshot(session, encoder.name, encoder.dim)
            self.record.note_inputs(session, data, snapshot_id)
        own = self.config.pessimism_kappa
        reward = PinnedReward(encoder, posterior, self.settings.pessimism_kappa if own is None else own)
        ready = Prepared(data, reward, current.champion, start_from, snapshot_id)
        material = material_of(self.settings, self.config, self.record, ready, self.verification)
        try:
            made = self.recipe.rows(material, self.config)
            ready.rows = fitting(made, self.settings.base_model_dir, self.config.max_row_tokens)
            ready.rows.check_number()
        except UnusableDataError as error:
            self.record.set_aside.update(data.set_aside)
            self.record.set_aside.update(ready.rows.set_aside)
            return self.record.finish("held", reason=error.message)
        rows = ready.rows
        rows.set_aside += self.verification.pop_faults()
        self.record.metric(phase="rows", sources=Counter(rows.sources), set_aside=rows.set_aside, **rows.facts)
        ready.save(self.record.run_dir)
        return ready
