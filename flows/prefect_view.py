"""What Prefect knows of the flows, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling

from flows.catalog import catalog
from infra.errors import ConflictError, NotFoundError
from infra.settings import Settings


def overview(settings: Settings) -> list[dict[str, Any]]:
    """Return each flow with its next and its last run."""
    rows = []
    with get_client(sync_client=True) as client:
        for scheduled in catalog(settings):
            deployment = client.read_deployment_by_name(scheduled.address)
            of_it = DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}})
            upcoming = client.read_flow_runs(
                deployment_filter=of_it,
                flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}}),
                sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
                limit=1,
            )
            begun = client.read_flow_runs(
                deployment_filter=of_it,
                flow_run_filter=FlowRunFilter.model_validate({"start_time": {"is_null_": False}}),
                sort=FlowRunSort.START_TIME_DESC,
                limit=1,
            )
            rows.append(
                {
                    "name": scheduled.name,
                    "cron": scheduled.cron,
                    "pool": deployment.work_pool_name,
                    "next": _moment(upcoming[0].next_scheduled_start_time) if upcoming else None,
                    "last": _moment(begun[0].start_time) if begun else None,
                    "state": begun[0].state_name if begun else None,
                    "run": str(begun[0].id) if begun else None,
                }
            )
    return rows


def start(settings: Settings, name: str, parameters: dict[str, Any]) -> str:
    """Start a flow now; return the id of its run.

    Raises
    ------
    NotFoundError
        Code ``flow_not_found``.
    """
    known = {scheduled.name: scheduled for scheduled in catalog(settings)}
    if name not in known:
        raise NotFoundError(f"There is no flow {name!r}; there are {', '.join(known)}.", code="flow_not_found")
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(known[name].address)
        return str(client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id)


def state_of(run_id: str) -> dict[str, Any]:
    """Return the state of a flow run by name, whether it is final, and what was said of it."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    if state is None:
        return {"state": "Unknown", "final": False, "message": ""}
    return {"state": state.name, "final": state.is_final(), "message": state.message or ""}


@contextmanager
def cancellation(run_id: str) -> Iterator[Callable[[], bool]]:
    """Give a way to ask, again and again, whether somebody asked Prefect for the end of a flow run.

    By a client that is kept: to make one takes 25 ms of processor, to ask 1.
    """
    with get_client(sync_client=True) as client:

        def is_cancelled() -> bool:
            state = client.read_flow_run(run_id).state
            return state is not None and (state.is_cancelling() or state.is_cancelled())

        yield is_cancelled


def cancel(run_id: str) -> None:
    """Ask for the end of a flow run.

    Raises
    ------
    ConflictError
        Code ``run_ended``.
    """
    if state_of(run_id)["final"]:
        raise ConflictError("The flow run has ended already.", code="run_ended")
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Cancelling(message="Cancelled by hand."))


def _moment(at: Any) -> str | None:
    return at.isoformat(timespec="seconds") if at is not None else None
