"""Registers the flows with Prefect and becomes a process worker for them."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.schedules import Cron

from infra.process import setup_logging
from infra.settings import Settings, load

log = logging.getLogger("everloop.flows")

POOL = "everloop"  # this machine's
ROOT = Path(__file__).resolve().parents[1]
WATCH_CRON = "*/30 * * * *"  # the night starts the watch itself; this takes over where that was lost


def register(settings: Settings) -> None:
    """Create the work pools and the deployments; safe to repeat."""
    with get_client(sync_client=True) as client:
        for pool in (POOL, settings.night_pool):
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    deployments = {
        "nightly.py:nightly": (settings.night_pool, settings.night_cron),
        "nightly.py:watch_canary": (POOL, WATCH_CRON),
        "backbone.py:reward_backbone": (POOL, settings.backbone_cron),
    }
    for entrypoint, (pool, cron) in deployments.items():
        remote = flow.from_source(source=str(ROOT), entrypoint=f"flows/{entrypoint}")
        remote.deploy(
            name="everloop",
            work_pool_name=pool,
            schedules=[Cron(cron, timezone=settings.time_zone)],
            build=False,
            push=False,
            print_next_steps=False,
        )
        log.info("deployed %s to %s", entrypoint, pool)


def main() -> None:
    """Run as a process: register, then hand over to Prefect's worker; with ``register`` as argument, end there."""
    setup_logging()
    settings = load()
    for attempt in range(60):
        try:
            register(settings)
            break
        except Exception as error:
            log.warning("Prefect is not ready (%s); trying again", type(error).__name__)
            if attempt == 59:
                raise
            time.sleep(1.0)
    if sys.argv[1:] == ["register"]:  # the worker is another container's
        return
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "prefect",
            "worker",
            "start",
            "--pool",
            POOL,
            "--type",
            "process",
            "--name",
            POOL,
        ],
    )


if __name__ == "__main__":
    main()
