"""The log's parts without the engine, for tests that kill its own processes."""

import pytest
import sqlalchemy as sa

from flows.bench.stack import ADDRESSES, log_stack
from tests.faults import tally
from tests.faults.harness import Log


@pytest.fixture(scope="module")
def log(home):
    """The log's parts, started once per module; the environment is restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLOOP_HOME", str(home))
        for name in ADDRESSES:
            patch.delenv(f"EVERLOOP_{name}", raising=False)
        with log_stack() as (settings, sessions, supervisor):
            with sessions.begin() as session:
                for statement in tally.TABLES:
                    session.execute(sa.text(statement))
            yield Log(settings, sessions, supervisor)
