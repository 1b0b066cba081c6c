"""One run: freeze what people said, make rows, train, register, judge, open a canary.

Each step reads and writes the run's row, so a page, a terminal and a restart see the same progress. A run that was
killed in its training goes on from its last checkpoint when the next one starts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from deploy import head, registry
from deploy.runs import LOCK, TrainingRun, request_cancel_of_flow
from infra.db import DATABASE_AWAY, LongLock, Sessions
from infra.errors import ConflictError, EverloopError
from infra.settings import Settings
from infra.telemetry import tracing
from reward import store
from reward.encoders import open_active_encoder
from trainer import collect, erasure, prepared
from trainer.admission import cooling_until
from trainer.candidate import Candidate, take_back
from trainer.failures import explained
from trainer.fit import check_shape, check_sides, fitting
from trainer.material import material_of
from trainer.prepared import Prepared
from trainer.recipe import UnusableDataError, resolve
from trainer.record import RunCancelledError, RunRecord
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
        The only share of users who meet the candidate; the setting's steps, if unset.
    min_new_signals
        Signals since the last run without which there is none; the setting's, if unset.
    flow_run_id
        What the scheduler calls it, where it was started by one.
    cool_down_s
        Time since the last promotion or rollback before which there is none.

    Raises
    ------
    InvalidRequestError
        Codes ``recipe_unknown`` and ``config_invalid``; nothing has begun.
    """

    def __init__(
        self,
        sessions: Sessions,
        settings: Settings,
        given: Mapping[str, Any],
        canary_share: float | None = None,
        min_new_signals: int | None = None,
        flow_run_id: str | None = None,
        cool_down_s: float = 0.0,
    ) -> None:
        self.sessions = sessions
        self.flow_run_id = flow_run_id
        self.cool_down_s = cool_down_s
        self.settings = settings
        self.recipe, self.config = resolve(given)
        self.canary_share = canary_share
        self.min_new_signals = settings.min_new_signals if min_new_signals is None else min_new_signals
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
        try:
            with LongLock(self.sessions, LOCK) as lock:
                if not lock.take():
                    raise ConflictError("Another training run is in progress.", code="run_in_progress")
                self.record.make_sure = lock.keep
                with tracing.span("training run", everloop__recipe=self.config.recipe):
                    return self._run_alone()
        finally:
            self.verification.close()

    def _run_alone(self) -> dict[str, Any]:
        interrupted = self._interrupted()
        try:
            if interrupted is None:
                self.record.create(self.config, self.flow_run_id)
            result = self._steps(interrupted)
        except DATABASE_AWAY:
            raise  # nothing could be recorded; the next run goes on with this one
        except Exception as error:
            # What ends the process (such as a SIGTERM) is no Exception: the next run goes on with this one.
            known = explained(error)
            if known is None or known.code != "lock_lost":  # it is another process's now
                self._fail(known, error)
            if known is not None and known is not error:
                raise known from error
            raise
        self._tidy_up()
        return result

    def _fail(self, known: EverloopError | None, error: Exception) -> None:
        """Record how the run failed; the reason is shown to users, and what an exception quotes is for the log."""
        log.error("%s failed", self.record.run_id, exc_info=error)
        status = "cancelled" if known is not None and known.code == "run_cancelled" else "failed"
        result = {"reason": known.message, "code": known.code} if known else {"reason": type(error).__name__}
        with self.sessions.begin() as session:
            self.record.end(session, status, result)
        self._tidy_up()

    def _tidy_up(self) -> None:
        # Of all runs: one may have been killed when it had ended and its files were still there.
        for run_dir in self.settings.runs_dir.glob("run_*"):
            prepared.discard(run_dir)
        erasure.sweep(self.sessions, self.settings.datasets_dir)

    def _interrupted(self) -> Prepared | None:
        """Return what a killed run was training on, and take its record over; other dead runs have failed."""
        with self.sessions() as session:
            running = sa.select(TrainingRun).where(TrainingRun.status == "running")
            dead = session.scalars(running.order_by(TrainingRun.started_at.desc())).all()
        found: Prepared | None = None
        for run in dead:
            record = RunRecord(self.sessions, self.settings.runs_dir)
            record.take_over(run.id)
            try:
                if found is not None:
                    raise ConflictError("Another run goes on.", code="run_in_progress")
                found = self._resumed(run, record)
            except EverloopError as error:
                bury(record, self.settings, run, error)
        return found

    def _resumed(self, run: TrainingRun, record: RunRecord) -> Prepared:
        """Take a run over; return what it was training on.

        Raises
        ------
        EverloopError
            It cannot or must not go on.
        """
        record.raise_if_cancelled()
        recipe, config = resolve(run.config)
        with self.sessions.begin() as session:
            ready = prepared.load(session, self.settings, run)
        flow_run_id = self.flow_run_id or run.flow_run_id
        record.update(resumed_at=sa.func.now(), resumes=run.resumes + 1, flow_run_id=flow_run_id)
        self.recipe, self.config = recipe, config
        self.verification.close()
        self.verification = Verification(config.verifiers, config.verifier_timeout_s)
        self.record.take_over(run.id)
        return ready

    def _steps(self, interrupted: Prepared | None) -> dict[str, Any]:
        ready = interrupted or self._prepare()
        if not isinstance(ready, Prepared):
            return ready
        self.record.set_aside.update(ready.data.set_aside)
        self.record.set_aside.update(ready.rows.set_aside)
        training = Training(
            self.sessions, self.settings, self.recipe, self.config, self.record, ready, self.verification
        )
        found = training.run()
        candidate = Candidate(self.sessions, self.settings, self.config, self.record, ready)
        return candidate.stand(found, self.verification, self.canary_share)

    def _prepare(self) -> Prepared | dict[str, Any]:
        """Return what is trained on; or how the run ended, where there is nothing."""
        self.record.phase("snapshot", 1)
        with self.sessions.begin() as session:
            through = collect.settled_seq(session)
        with self.sessions.begin() as session:
            current = head.read(session)
            if current.canary_id is not None:
                reason = f"canary {current.canary_id} is still open"
                return self.record.finish("skipped", reason=reason, code="canary_open")
            cooling = cooling_until(session, self.cool_down_s)
            seen = session.scalar(
                sa.select(sa.func.max(TrainingRun.last_signal_seq)).where(
                    TrainingRun.status.in_(["canary", "held"])
                )
            )
            redactor = Redactor.from_settings(self.settings)
            data = collect.take(session, redactor, after_seq=seen or 0, through_seq=through)
            start_from = registry.clean_ancestor(session, current.champion)
            check_shape(self.config, self.settings, registry.config_of(session, start_from))
            # A wrong one is told before it is sampled from.
            registry.verified_path(session, self.settings, start_from)
        self.record.update(last_signal_seq=data.last_signal_seq)
        must_retrain = start_from != current.champion  # the champion learned from somebody who was forgotten
        if cooling is not None and not must_retrain:
            reason = f"somebody was promoted or rolled back lately; nights go on from {cooling:%Y-%m-%d %H:%M} UTC"
            return self.record.finish("skipped", reason=reason, code="cool_down")
        if data.num_new_signals < self.min_new_signals and not must_retrain:
            reason = f"{data.num_new_signals} new signals; min_new_signals is {self.min_new_signals}"
            return self.record.finish("skipped", reason=reason, code="few_new_signals")
        data.save(self.settings.datasets_dir)
        with self.sessions.begin() as session:
            encoder = open_active_encoder(session, self.settings)
            snapshot_id, posterior = store.pin_snapshot(session, encoder.name, encoder.dim)
            self.record.note_inputs(session, data, snapshot_id)
            own = self.config.pessimism_kappa
            reward = PinnedReward(encoder, posterior, self.settings.pessimism_kappa if own is None else own)
            prepared.remember(session, reward, data)
        ready = Prepared(data, reward, current.champion, start_from, snapshot_id)
        material = material_of(self.settings, self.config, self.record, ready, self.verification)
        try:
            check_sides(data)
            made = self.recipe.rows(material, self.config)
            ready.rows = fitting(made, self.settings, self.config)
            if self.recipe.whole_batches:
                ready.rows = ready.rows.whole(self.config.rows_per_step)
            ready.rows.check_number()
        except UnusableDataError as error:
            for counts in (data.set_aside, error.set_aside, self.verification.pop_faults()):
                self.record.set_aside.update(counts)
            return self.record.finish("held", reason=error.message, code=error.code)
        rows = ready.rows
        rows.set_aside += self.verification.pop_faults()
        self.record.metric(phase="rows", sources=Counter(rows.sources), set_aside=rows.set_aside, **rows.facts)
        ready.save(self.record.run_dir)
        return ready


def bury(record: RunRecord, settings: Settings, run: TrainingRun, error: EverloopError) -> None:
    """End the record of a run whose process died, and remove what it left; call it under the lock of the runs."""
    status = "cancelled" if error.code == "run_cancelled" else "failed"
    if run.release is not None:
        take_back(record, settings, run.release)
    with record.sessions.begin() as session:
        result = {"reason": f"The process died. {error.message}", "code": error.code}
        record.end(session, status, result)
    prepared.discard(record.run_dir)


def end_cancelled(sessions: Sessions, settings: Settings, flow_run_id: str, timeout_s: float = 30.0) -> str | None:
    """End a run whose process was stopped because somebody cancelled its flow; return the run, if there was one.

    Without it the next night would take the run for one that was killed, and go on with it.

    Raises
    ------
    ConflictError
        Code ``run_in_progress`` where its process has not gone in time; it is asked to end after its step.
    """
    with sessions.begin() as session:
        run = request_cancel_of_flow(session, flow_run_id)
    if run is None:
        return None
    with LongLock(sessions, LOCK) as lock:
        until_s = time.monotonic() + timeout_s
        while not lock.take():
            if time.monotonic() > until_s:
                raise ConflictError(f"{run.id} has not ended yet; it does after its step.", code="run_in_progress")
            time.sleep(0.5)
        with sessions() as session:
            run = session.get_one(TrainingRun, run.id)  # it may have ended by itself meanwhile
        if run.status == "running":
            record = RunRecord(sessions, settings.runs_dir, lock.keep)
            record.take_over(run.id)
            bury(record, settings, run, RunCancelledError("Its flow was cancelled."))
    return run.id
