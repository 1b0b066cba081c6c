"""Registers the flows with Prefect and becomes a process worker for them."""

from __future__ import annotations

import json
import logging
import runpy
import sys
import time
from contextlib import suppress
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectAlreadyExists
from prefect.schedules import Cron
from prefect.states import Crashed

from deploy.metrics import RunCollector
from flows.catalog import DEPLOYMENT, POOL, catalog
from infra.db import connect
from infra.errors import SetupError
from infra.process import tell_of_itself
from infra.settings import Settings, load

log = logging.getLogger("everloop.flows")

RUN_ID = "PREFECT__FLOW_RUN_ID"  # in the environment of a flow run's process


def register(settings: Settings) -> None:
    """Create the work pools and the deployments; safe to repeat."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=settings.flow_concurrency))
        if settings.night_pool != POOL:
            with suppress(ObjectAlreadyExists):  # whoever made it has set it up
                client.create_work_pool(_night_pool(settings))
    for scheduled in catalog(settings):
        limit = None
        if scheduled.limit is not None:
            limit = ConcurrencyLimitConfig(
                limit=scheduled.limit, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            )
        deployment = scheduled.load().to_deployment(
            name=DEPLOYMENT,
            entrypoint_type=EntrypointType.MODULE_PATH,
            schedules=[Cron(scheduled.cron, timezone=settings.time_zone)],
            concurrency_limit=limit,
        )
        deployment.apply(work_pool_name=scheduled.pool)
        log.info("deployed %s to %s", scheduled.name, scheduled.pool)


def _night_pool(settings: Settings) -> WorkPoolCreate:
    """Return the pool of the nights as the settings describe it.

    Raises
    ------
    SetupError
        Code ``pool_template_invalid``.
    """
    template: dict[str, Any] = {}
    if settings.pool_template is not None:
        try:
            template = json.loads(settings.pool_template.expanduser().read_text())
            whole = bool(template["job_configuration"] and template["variables"])
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise SetupError(
                f"pool_template names {settings.pool_template}, which is no JSON file with a job_configuration and "
                "variables. Begin with what `prefect work-pool get-default-base-job-template --type "
                f"{settings.pool_type}` writes.",
                code="pool_template_invalid",
            )
    return WorkPoolCreate(name=settings.night_pool, type=settings.pool_type, base_job_template=template)


def end_orphans() -> list[str]:
    """Tell Prefect that runs of this machine have crashed whose processes are gone; return their names.

    A stack that died with its flows leaves them running for Prefect, where they take the place of others. Only
    for a pool that this machine serves alone.
    """
    living = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            living.add(process.environ().get(RUN_ID))
    with get_client(sync_client=True) as client:
        begun = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
            ),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
        )
        gone = [run for run in begun if str(run.id) not in living]
        for run in gone:
            state = Crashed(message="Its process was gone when the worker started.")
            client.set_flow_run_state(run.id, state, force=True)
            log.warning("%s had no process any more", run.name)
    return [run.name for run in gone]


def main() -> None:
    """Run as a process: register, then become Prefect's worker, which is given our own arguments, too."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=1)
    tell_of_itself("flows", settings, RunCollector(sessions))
    for attempt in range(60):
        try:
            register(settings)
            if _is_embedded(settings):
                end_orphans()
            break
        except SetupError:
            raise
        except Exception as error:
            log.warning("Prefect is not ready (%s); trying again", type(error).__name__)
            if attempt == 59:
                raise
            time.sleep(1.0)
    # In this process, which goes on to serve its metrics.
    worker = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL]
    sys.argv = [*worker, *sys.argv[1:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _is_embedded(settings: Settings) -> bool:
    """Tell whether Prefect's server is this stack's own, so that nobody else serves its pool."""
    return settings.stack_file.exists() and "prefect_url" in json.loads(settings.stack_file.read_text())


if __name__ == "__main__":
    main()
