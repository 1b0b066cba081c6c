"""Parts are stopped and started under load: no request that was accepted fails, and each part is soon gone."""

import threading
import time

import httpx
import pytest

from feedback.tables import Episode
from flows.bench.mixed_load import MixedLoad
from flows.bench.stack import ADDRESSES, own_stack
from infra.stack import embedded
from infra.stack.supervisor import stack_processes
from tests.conftest import wait_until

GONE_S = 10.0


@pytest.fixture(scope="module")
def whole(home):
    """A whole stack of this module's own: at the end it is stopped under load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLOOP_HOME", str(home))
        for name in ADDRESSES:
            patch.delenv(f"EVERLOOP_{name}", raising=False)
        with own_stack() as (settings, sessions, supervisor):
            yield settings, sessions, supervisor


def state(supervisor, name):
    return next(part.state for part in supervisor.status() if part.name == name)


@pytest.mark.parametrize("part", ["api", "relay", "ledger", "reconciler", "reward", "flows", "prefect", "door"])
def test_a_part_that_is_stopped_under_load_is_soon_gone_and_no_request_fails(whole, part):
    settings, _, supervisor = whole
    with MixedLoad(settings) as load:
        wait_until(lambda: load.done["vote"] >= 3 and load.done["page"] >= 2, timeout_s=60)
        began_s = time.monotonic()
        supervisor.stop(part)
        took_s = time.monotonic() - began_s
        time.sleep(0.5)
        supervisor.start(part)
        wait_until(lambda: state(supervisor, part) == "running", timeout_s=30)
        before = load.done["vote"]
        wait_until(lambda: load.done["vote"] >= before + 3, timeout_s=90, what=f"{load.failures} {load.refused}")
    print(f"{part}: {took_s:.1f} s")
    assert took_s < GONE_S and killed(settings, part) == 0
    assert not load.failures and not load.refused


def killed(settings, part):
    """Count how often supervisord lost patience with a part."""
    log = (settings.log_dir / "supervisord.log").read_text()
    return sum(f"killing '{part}'" in line and "SIGKILL" in line for line in log.splitlines())


def test_an_answer_that_would_take_too_long_is_ended_whole_and_kept_as_interrupted(whole):
    settings, sessions, supervisor = whole
    body = {"model": "everloop", "user": "patient", "max_tokens": 1500, "stream": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "Count from 1 to 1000, one number on each line."}]
    lines = []

    def read():
        url = f"{settings.public_url}/v1/chat/completions"
        given = {"json": body, "timeout": 120, "trust_env": False, "headers": settings.credentials}
        with httpx.stream("POST", url, **given) as response:
            lines.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(lines) > 5 or not reader.is_alive(), timeout_s=60)
    began_s = time.monotonic()
    supervisor.stop("api")
    took_s = time.monotonic() - began_s
    reader.join()
    supervisor.start("api")
    assert took_s < GONE_S and lines[-1] == "data: [DONE]" and '"finish_reason": "length"' in lines[-2]
    with sessions() as session:
        [episode] = session.query(Episode).filter_by(user_id="patient").all()
    assert episode.status == "interrupted" and episode.answer
    wait_until(lambda: state(supervisor, "api") == "running", timeout_s=30)


def test_the_whole_stack_stops_under_load_without_a_failed_request(whole):
    settings, _, supervisor = whole
    with MixedLoad(settings) as load:
        wait_until(lambda: load.done["vote"] >= 3, timeout_s=90)
        pids = {part.name: part.pid for part in supervisor.status()}
        began_s = time.monotonic()
        embedded.down(settings)
        took_s = time.monotonic() - began_s
    log = (settings.log_dir / "supervisord.log").read_text()
    assert not load.failures and load.refused, "people were served to the end, and then nobody was"
    assert "SIGKILL" not in log and len(pids) == 11
    assert took_s < 40 and not stack_processes(settings.home)
    print(f"down: {took_s:.1f} s")
