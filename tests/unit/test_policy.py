"""Versions of a policy: no name is ever used twice, whatever fails or dies."""

import asyncio
from contextlib import closing

import pytest

from infra.errors import UnavailableError
from trainer import policy, rollout
from trainer.policy import ServedPolicy


class Engine:
    """Remembers what it holds; refuses what it is told to."""

    def __init__(self):
        self.loaded = {}
        self.unloaded = []
        self.is_away = False

    def __call__(self, url, key=None):
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def models(self):
        return ["base", *self.loaded]

    async def load_adapter(self, name, path):
        if self.is_away:
            raise UnavailableError("away")
        self.loaded[name] = path

    async def unload_adapter(self, name):
        self.unloaded.append(name)
        del self.loaded[name]


@pytest.fixture
def engine(monkeypatch):
    found = Engine()
    monkeypatch.setattr(policy, "EngineClient", found)
    return found


def save(directory):
    directory.mkdir(parents=True)


def test_each_version_has_a_name_of_its_own_and_takes_the_place_of_the_one_before(engine, tmp_path):
    (tmp_path / "r").mkdir()
    with closing(ServedPolicy("", tmp_path / "r", keep=2)) as served:
        for _ in range(3):
            served.publish(save)
        assert list(engine.loaded) == ["run/r@2", "run/r@3"] and served.name == "run/r@3"
        assert served.lag("run/r@2") == 1
    assert not engine.loaded and not (tmp_path / "r" / "policy").exists()


def test_a_process_that_goes_on_with_a_run_gives_other_names_and_clears_the_dead_ones(engine, tmp_path):
    dead = ServedPolicy("", tmp_path)  # it is killed: nothing is closed, and its files stay
    dead.publish(save)
    dead.publish(save)
    with closing(ServedPolicy("", tmp_path)) as served:
        served.publish(save)
        assert served.version == 3 and list(engine.loaded) == [served.name]
    assert engine.unloaded == [dead.name_of(1), dead.name_of(2), dead.name_of(3)]


def test_a_version_that_the_engine_refused_leaves_its_number_unused(engine, tmp_path):
    with closing(ServedPolicy("", tmp_path)) as served:
        served.publish(save)
        engine.is_away = True
        with pytest.raises(UnavailableError):
            served.publish(save, patience_s=0.0)
        assert served.version == 1  # which is served still
        engine.is_away = False
        served.publish(save)
        assert served.version == 3 and list(engine.loaded) == [served.name]


def test_an_engine_that_was_started_anew_gets_the_same_versions_under_the_same_names(engine, tmp_path):
    with closing(ServedPolicy("", tmp_path, keep=2)) as served:
        for _ in range(3):
            served.publish(save)
        held = dict(engine.loaded)
        del engine.loaded[served.name]
        asyncio.run(served.restore(engine))
        assert engine.loaded == held
        engine.loaded.clear()
        asyncio.run(served.restore(engine))
        assert engine.loaded == held and served.version == 3


def test_a_version_waits_for_an_engine_that_is_away(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "ASK_AGAIN_S", 0.001)
    tried, load = [], engine.load_adapter

    async def comes_back(name, path):
        tried.append(name)
        engine.is_away = len(tried) < 3
        await load(name, path)

    engine.load_adapter = comes_back
    with closing(ServedPolicy("", tmp_path)) as served:
        served.publish(save)
        assert tried == [served.name] * 3 and list(engine.loaded) == [served.name]


def test_what_was_given_again_while_it_was_unloaded_does_not_stay(engine, tmp_path):
    with closing(ServedPolicy("", tmp_path)) as served:
        served.publish(save)
        served.publish(save)
        engine.loaded[served.name_of(1)] = "its directory was still there"
    assert not engine.loaded
