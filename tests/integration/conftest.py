"""A registry with a small base model, on a PostgreSQL alone."""

import pytest

from deploy import registry
from infra.settings import Settings
from tests.adapters import make_adapter, make_base


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
