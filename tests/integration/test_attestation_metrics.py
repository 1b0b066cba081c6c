"""What an engine does not prove is counted, and what cannot be loaded: one that ignores adapters is told of."""

import asyncio
import threading

import pytest
from prometheus_client import REGISTRY

from deploy import registry
from deploy.reconciler import Reconciler
from deploy.replica import ReplicaKeeper
from flows.bench.adapters import linear_shapes, write_adapter
from flows.bench.gateway import null_engine_url
from infra.settings import Settings
from tests.conftest import wait_until


@pytest.fixture(scope="module")
def engine():
    with null_engine_url() as url:
        yield url


def failures(replica, reason):
    labels = {"replica": replica, "reason": reason}
    return REGISTRY.get_sample_value("everloop_attestation_failures_total", labels)


def test_what_is_not_proved_is_counted_and_what_cannot_be_loaded(engine, database, base_model_dir, tmp_path):
    settings = Settings(home=tmp_path, base_model=str(base_model_dir), engine_url=engine)
    write_adapter(tmp_path / "adapter", linear_shapes(base_model_dir), 4, seed=1)
    with database.begin() as session:
        one = registry.register(session, settings, tmp_path / "adapter", run_id=None, manifest={}).name
        weights = registry.verified_path(session, settings, one) / "adapter_model.safetensors"
    keeper = ReplicaKeeper(database, settings, engine)
    assert asyncio.run(keeper.keep(["base"])) == ["base"]
    assert (failures(engine, "unproved"), failures(engine, "not_loaded")) == (0, 0), "they begin at nought"
    assert asyncio.run(keeper.keep(["base", one])) == []
    assert (failures(engine, "unproved"), failures(engine, "not_loaded")) == (1, 0)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    keeper._failures.clear()  # as after its pause
    assert asyncio.run(keeper.keep([one])) == []
    assert (failures(engine, "unproved"), failures(engine, "not_loaded")) == (1, 1)


def test_nothing_is_told_of_a_replica_that_is_gone(engine, database, base_model_dir, tmp_path, monkeypatch):
    named = [f"{engine}/", engine]

    async def addresses(_):
        return named

    monkeypatch.setattr("deploy.reconciler.addresses", addresses)
    reconciler = Reconciler(database, Settings(home=tmp_path, base_model=str(base_model_dir), engine_url=engine))
    stop = threading.Event()
    thread = threading.Thread(target=reconciler.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: failures(f"{engine}/", "unproved") == 0, what="it is not told of")
        named.remove(f"{engine}/")
        wait_until(lambda: failures(f"{engine}/", "unproved") is None, what="it is told of still")
        assert failures(engine, "unproved") is not None
    finally:
        stop.set()
        thread.join()
