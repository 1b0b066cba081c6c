"""The night run and the canary watch, as Prefect flows."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from prefect import flow
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelled, State

from deploy import head
from deploy.canary import LOOK_EVERY_S, WATCH_LOCK, Watch
from deploy.runs import TrainingRun
from flows import artifacts
from flows.hooks import end_cancelled_night, heeding_cancellation
from flows.retries import step
from infra.db import Sessions, advisory_lock, connect
from infra.errors import ConflictError, EverloopError, InvalidRequestError
from infra.settings import Settings, load
from infra.telemetry import tracing

NIGHTLY = "nightly/everloop"
WATCH = "watch-canary/everloop"


@flow(name="nightly", log_prints=True, on_cancellation=[end_cancelled_night])  # type: ignore[untyped-decorator]
def nightly(
    canary_share: float | None = None,
    config: dict[str, Any] | None = None,
    min_new_signals: int | None = None,
    by_hand: bool = False,
) -> dict[str, Any] | State[Any]:
    """Freeze, sample, train, judge; where a candidate passes, open a canary and have it watched.

    Parameters
    ----------
    canary_share
        The only share of users who meet the candidate; the setting's steps, if unset.
    config
        The recipe and its settings, instead of the file that `training_config` names.
    min_new_signals
        Signals since the last run without which there is none; the setting's, if unset.
    by_hand
        Whether somebody asked for it now: quiet hours and the cool-down do not hold it up.
    """
    from trainer.admission import quiet_until
    from trainer.config import read_toml

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    given = config or {}
    asked = {"canary_share": canary_share, "config": config, "min_new_signals": min_new_signals}
    until = quiet_until(settings.quiet_hours, ZoneInfo(settings.time_zone), datetime.now(UTC))
    if until is not None and not by_hand and settings.quiet_hours_then == "wait":
        return _wait(until, asked)
    try:
        if config is None and settings.training_config_file:
            given = read_toml(settings.training_config_file)
        if until is not None and not by_hand:
            result = _skip(sessions, settings, given, until)
        else:
            cool_down_s = 0.0 if by_hand else settings.night_cool_down_s
            result = train(sessions, settings, given, canary_share, min_new_signals, flow_run.id, cool_down_s)
    except InvalidRequestError as error:
        _note_refusal(sessions, given, error)
        raise
    except ConflictError as error:
        if by_hand or error.code != "run_in_progress":
            raise
        return {"status": "skipped", "reason": error.message, "code": error.code}  # the other one is the night's
    except EverloopError as error:
        if error.code != "run_cancelled":
            raise
        return Cancelled(message=error.message)  # of one that is being cancelled Prefect takes no other end
    print(f"{result['run_id']}: {result['status']} {result.get('reason', '')}")
    with sessions() as session:
        is_open = head.read(session).canary_id is not None
        digest = session.get_one(TrainingRun, result["run_id"]).dataset_digest
    artifacts.of_night(settings, result, digest)
    if is_open:  # this night's, or one that was left unwatched; a second watch ends at once
        run_deployment(WATCH, timeout=0, as_subflow=False)
    return result


@step
def train(sessions: Sessions, settings: Settings, given: dict[str, Any], *options: Any) -> dict[str, Any]:
    """Run a night; tried again, it goes on with the run that it had begun, where the database was away."""
    from trainer.night import Night

    tracing.start(settings, "run")
    try:
        with heeding_cancellation(sessions, flow_run.id):
            return Night(sessions, settings, given, *options).run()
    finally:
        tracing.stop()


def _wait(until: datetime, parameters: dict[str, Any]) -> dict[str, Any]:
    """Have Prefect start the night at the end of the quiet hours, once, however many fall into them."""
    run_deployment(
        NIGHTLY,
        parameters=parameters,
        scheduled_time=until,
        timeout=0,
        as_subflow=False,
        idempotency_key=f"the night after quiet hours, {until.isoformat()}",
    )
    reason = f"quiet hours; it starts at {until:%Y-%m-%d %H:%M} UTC"
    print(reason)
    return {"status": "waiting", "reason": reason, "code": "quiet_hours"}


def _skip(sessions: Sessions, settings: Settings, given: dict[str, Any], until: datetime) -> dict[str, Any]:
    """Record a night that quiet hours left no room for."""
    from trainer.recipe import resolve
    from trainer.record import RunRecord

    record = RunRecord(sessions, settings.runs_dir)
    record.create(resolve(given)[1], flow_run.id)
    return record.finish("skipped", reason=f"quiet hours until {until:%Y-%m-%d %H:%M} UTC", code="quiet_hours")


def _note_refusal(sessions: Sessions, given: dict[str, Any], error: InvalidRequestError) -> None:
    from trainer.record import note_refusal

    with sessions.begin() as session:
        note_refusal(session, given, error)


@flow(name="watch-canary", log_prints=True)  # type: ignore[untyped-decorator]
def watch_canary() -> str:
    """Look at the open canary after every vote until it is decided or out of time."""
    settings = load()
    outcome: str = watch(connect(settings.need("database_url"), pool_size=2), settings)
    print(outcome)
    artifacts.page(settings, "rollout", "/rollout", outcome)
    return outcome


@step
def watch(sessions: Sessions, settings: Settings) -> str:
    """Look once a second, unless somebody else does."""
    with advisory_lock(sessions, WATCH_LOCK) as held:
        if not held:
            return "watched by another run"
        current = Watch(sessions, settings)
        while True:
            outcome = current.look()
            if outcome is not None:
                return outcome
            time.sleep(LOOK_EVERY_S)
