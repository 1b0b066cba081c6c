"""The night run and the canary watch, as Prefect flows."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment
from prefect.runtime import flow_run

from deploy import head
from deploy.canary import LOOK_EVERY_S, WATCH_LOCK, Watch
from infra.db import advisory_lock, connect
from infra.errors import InvalidRequestError
from infra.settings import load
from infra.telemetry import tracing

NIGHTLY = "nightly/everloop"
WATCH = "watch-canary/everloop"


@flow(name="nightly", log_prints=True)  # type: ignore[untyped-decorator]
def nightly(
    canary_share: float | None = None, config: dict[str, Any] | None = None, min_new_signals: int | None = None
) -> dict[str, Any]:
    """Freeze, sample, train, judge; where a candidate passes, open a canary and have it watched.

    Parameters
    ----------
    canary_share
        The only share of users who meet the candidate; the setting's steps, if unset.
    config
        The recipe and its settings, instead of the file that `training_config` names.
    min_new_signals
        Signals since the last run without which there is none; the setting's, if unset.
    """
    from trainer.config import read_toml
    from trainer.night import Night
    from trainer.record import note_refusal

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    given = config or {}
    try:
        if config is None and settings.training_config_file:
            given = read_toml(settings.training_config_file)
        night = Night(sessions, settings, given, canary_share, min_new_signals, flow_run.id)
    except InvalidRequestError as error:
        with sessions.begin() as session:
            note_refusal(session, given, error)
        raise
    tracing.start(settings, "run")
    try:
        result = night.run()
    finally:
        tracing.stop()
    print(f"{result['run_id']}: {result['status']} {result.get('reason', '')}")
    with sessions() as session:
        is_open = head.read(session).canary_id is not None
    if is_open:  # this night's, or one that was left unwatched; a second watch ends at once
        run_deployment(WATCH, timeout=0, as_subflow=False)
    return result


@flow(name="watch-canary", log_prints=True, retries=20, retry_delay_seconds=5)  # type: ignore[untyped-decorator]
def watch_canary() -> str:
    """Look at the open canary after every vote until it is decided or out of time."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    with advisory_lock(sessions, WATCH_LOCK) as held:
        if not held:
            return "watched by another run"
        watch = Watch(sessions, settings)
        while True:
            outcome = watch.look()
            if outcome is not None:
                print(outcome)
                return outcome
            time.sleep(LOOK_EVERY_S)
