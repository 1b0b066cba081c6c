"""Nights go to the work pool that the settings name, and its worker takes them up."""

import os
import subprocess
import sys

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import worker
from flows.catalog import POOL
from flows.nightly import NIGHTLY
from infra.stack.parts import prefect_environment
from tests.conftest import wait_until

pytestmark = pytest.mark.slow
OTHER = "gpu"


@pytest.fixture
def environment(stack):
    """Have nights run by another pool, at the end by this machine's again; the environment of its worker."""
    settings = stack.settings
    ours = {PREFECT_API_URL: settings.need("prefect_url"), PREFECT_API_AUTH_STRING: settings.prefect_auth}
    with temporary_settings(ours):
        worker.register(stack.settings.model_copy(update={"night_pool": OTHER}))
        yield {**os.environ, **prefect_environment(stack.settings)}
        worker.register(stack.settings)


def test_a_night_is_taken_up_by_the_worker_of_its_pool(environment):
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(NIGHTLY)
        assert deployment.work_pool_name == OTHER
        assert client.read_deployment_by_name("watch-canary/everloop").work_pool_name == POOL
        night = client.create_flow_run_from_deployment(deployment.id, parameters={"config": {"recipe": "none"}})
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", OTHER, "--run-once"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-2000:]

        def ended():
            state = client.read_flow_run(night.id).state
            return state if state.is_final() else None

        state = wait_until(ended, timeout_s=60)
        assert state.is_failed() and "There is no recipe 'none'" in state.message
