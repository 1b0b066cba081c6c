"""What passes by itself is tried again; what is wrong stays wrong."""

import pytest
from kafka.errors import KafkaTimeoutError
from prefect.states import Failed
from sqlalchemy.exc import OperationalError

from flows.retries import RETRIES, _may_help, is_transient, step
from infra.errors import ConflictError, IntegrityError, InvalidRequestError, UnavailableError


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (UnavailableError("the engine is away", code="engine_unavailable"), True),
        (OperationalError("SELECT 1", {}, Exception()), True),
        (KafkaTimeoutError(), True),
        (InvalidRequestError("there is no such recipe"), False),
        (ConflictError("another run", code="run_in_progress"), False),
        (IntegrityError("changed"), False),
        (KeyError("a bug"), False),
    ],
)
def test_only_what_is_away_is_tried_again(error, again):
    assert is_transient(error) is again
    assert _may_help(None, None, Failed(data=error, message="failed")) is again


def test_pauses_grow_and_are_few():
    made = step(lambda: None)
    assert made.retries == RETRIES and made.retry_delay_seconds == [5.0, 10.0, 20.0, 40.0]
