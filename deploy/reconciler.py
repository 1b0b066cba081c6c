"""The reconciler: keeps the engine holding exactly the releases that the head names.

Serving is a desired state. A runtime load is gone after the engine's restart, so the reconciler looks every
second, loads what is missing under its immutable name (files checked by digest first), and unloads adapters
that nothing refers to any more.
"""

from __future__ import annotations

import asyncio
import logging
import threading

import sqlalchemy as sa

from deploy import head, registry
from deploy.runs import TrainingRun
from deploy.store import open_store
from deploy.tables import Release
from infra.db import DATABASE_AWAY, Sessions, connect
from infra.engine import EngineClient
from infra.errors import EverloopError
from infra.process import run_until_stopped
from infra.settings import BASE_MODEL_NAME, Settings, load

log = logging.getLogger("everloop.reconciler")

INTERVAL_S = 1.0
# An answer begun on a release may still be running when the head moves: keep what nobody wants for so many rounds.
KEEP_ROUNDS = 1800


class Reconciler:
    """Compares what is served with what should be, and mends the difference."""

    def __init__(self, sessions: Sessions, settings: Settings, engine_url: str) -> None:
        self.sessions = sessions
        self.settings = settings
        self.engine_url = engine_url
        self._idle_rounds: dict[str, int] = {}

    def run(self, stop: threading.Event) -> None:
        """Reconcile every second until told to stop."""
        while not stop.is_set():
            try:
                asyncio.run(self.reconcile())
            except (EverloopError, *DATABASE_AWAY) as error:
                log.warning("%s: %s", type(error).__name__, error)
            stop.wait(INTERVAL_S)

    async def reconcile(self) -> list[str]:
        """Make one round; return the names that were loaded."""
        with self.sessions() as session:
            current = head.read(session)
            # The champion first: a challenger that cannot be loaded must not keep it from most users.
            wanted = [n for n in (current.champion, current.challenger) if n and n != BASE_MODEL_NAME]
        loaded = []
        async with EngineClient(self.engine_url) as engine:
            served = set(await engine.models())
            for name in wanted:
                if name in served:
                    continue
                try:
                    await load_release(self.sessions, self.settings, engine, name)
                    loaded.append(name)
                except EverloopError as error:
                    log.error("%s is not served: %s [%s]", name, error.message, error.code)
            for name in self._expired(served.difference(wanted)):
                await engine.unload_adapter(name)
                log.info("unloaded %s", name)
        return loaded

    def _expired(self, unwanted: set[str]) -> list[str]:
        """Return releases that nobody has wanted for long; names that are not ours are left alone.

        A run that has not ended wants its own: it is judged before the head names it.
        """
        with self.sessions() as session:
            ours = unwanted.intersection(
                session.scalars(sa.select(Release.name).where(Release.adapter_digest.is_not(None)))
            )
            at_once = [name for name in ours if registry.is_quarantined(session, name)]
            judged = session.scalars(sa.select(TrainingRun.release).where(TrainingRun.status == "running")).all()
        self._idle_rounds = {name: self._idle_rounds.get(name, 0) + 1 for name in ours.difference(judged)}
        return at_once + [n for n, rounds in self._idle_rounds.items() if rounds > KEEP_ROUNDS and n not in at_once]


async def load_release(sessions: Sessions, settings: Settings, engine: EngineClient, name: str) -> None:
    """Load a release's adapter into the engine, after checking its base model and its files."""
    with sessions() as session:
        digest = registry.check_servable(session, settings, name)
    if digest is None:
        return
    await engine.load_adapter(name, open_store(settings).fetch(digest))
    log.info("loaded %s", name)


def main() -> None:
    """Run the reconciler as a process."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    run_until_stopped("reconciler", Reconciler(sessions, settings, settings.need("engine_url")).run)


if __name__ == "__main__":
    main()
