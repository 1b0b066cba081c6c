"""Which failures a flow tries again: those that pass by themselves. What is wrong stays wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from infra.db import DATABASE_AWAY
from infra.errors import UnavailableError
from infra.kafka import KafkaError

RETRIES = 4
FIRST_PAUSE_S = 5.0  # then 10, 20 and 40 s: longer than a part takes to come back, shorter than anybody waits
JITTER = 0.3  # so that flows which a restart of the database ended do not all come back in the same moment
AWAY = (UnavailableError, PoolTimeoutError, KafkaError, *DATABASE_AWAY)


def is_transient(error: BaseException) -> bool:
    """Tell whether trying again may help: the database, the broker, the engine or the store was away."""
    return isinstance(error, AWAY)


def _may_help(_task: Any, _run: Any, state: Any) -> bool:
    try:
        state.result()
    except Exception as error:
        return is_transient(error)
    return False


def step(act: Callable[..., Any]) -> Any:
    """Make a function a step of a flow: tried again, with growing pauses, where that may help."""
    return task(
        act,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(FIRST_PAUSE_S),
        retry_jitter_factor=JITTER,
        retry_condition_fn=_may_help,
        cache_policy=NO_CACHE,  # it is done for its effect
        persist_result=False,
        log_prints=True,
    )
