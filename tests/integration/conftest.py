"""A registry with a small base model, on a PostgreSQL alone, and the command line on it."""

import os
import subprocess

import pytest

from deploy import registry
from infra.settings import Settings
from tests.adapters import make_adapter, make_base
from tests.conftest import EVERLOOP


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path / "home", base_model=str(make_base(tmp_path / "base")))


@pytest.fixture
def registered(database, settings, tmp_path):
    """A function that registers an adapter and returns its release's name."""

    def register(seed=0, started_from="base", run_id=None, name=None, **manifest):
        source = make_adapter(tmp_path / f"source-{seed}", seed=seed)
        manifest = {"started_from": started_from, **manifest}
        with database.begin() as session:
            return registry.register(session, settings, source, run_id=run_id, manifest=manifest, name=name).name

    return register


@pytest.fixture
def everloop(database, settings, monkeypatch):
    """The command line on this test's database and home; returns (exit status, standard output and error)."""
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    named = {"home": settings.home, "base_model": settings.base_model, "database_url": url}
    named["public_url"] = "http://127.0.0.1:8080"
    environment = os.environ | {f"EVERLOOP_{name.upper()}": str(value) for name, value in named.items()}

    def run(*arguments):
        done = subprocess.run([*EVERLOOP, *arguments], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run
