"""The reconciler: keeps every replica holding exactly the releases that are wanted, and has each prove it.

Serving is a desired state. A runtime load reaches only the replica that answers it and is gone after its
restart, so each replica is looked at every second, on its own: one that hangs keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import logging
import threading

import sqlalchemy as sa

from deploy import serving
from deploy.metrics import ReplicaCollector, drop_failures
from deploy.replica import ReplicaKeeper
from deploy.tables import Attestation, Replica
from infra.db import DATABASE_AWAY, Sessions, connect
from infra.errors import EverloopError
from infra.fleet import addresses
from infra.process import run_until_stopped
from infra.settings import Settings, load

log = logging.getLogger("everloop.reconciler")

INTERVAL_S = 0.5


class Reconciler:
    """Compares what is served with what should be, on every replica, and mends the difference."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        self.sessions = sessions
        self.settings = settings
        self.keepers: dict[str, ReplicaKeeper] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def run(self, stop: threading.Event) -> None:
        """Reconcile until told to stop."""
        asyncio.run(self._run(stop))

    async def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            urls = await addresses(self.settings)
            for url in self._tasks.keys() - set(urls):
                self._tasks.pop(url).cancel()
                drop_failures(url)
            try:
                await asyncio.to_thread(self._forget_others, urls)
            except DATABASE_AWAY as error:
                log.warning("%s", type(error).__name__)
            for url in urls:
                if url not in self._tasks or self._tasks[url].done():
                    self._tasks[url] = asyncio.create_task(self._keep(url))
            await asyncio.to_thread(stop.wait, INTERVAL_S)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep(self, url: str) -> None:
        while True:
            try:
                await self.reconcile(url)
            except (EverloopError, *DATABASE_AWAY) as error:
                log.warning("%s: %s: %s", url, type(error).__name__, error)
            except Exception:
                log.exception("%s", url)
            await asyncio.sleep(INTERVAL_S)

    async def reconcile(self, url: str) -> list[str]:
        """Make one round at a replica; return the releases that were proved in it."""
        keeper = self.keepers.setdefault(url, ReplicaKeeper(self.sessions, self.settings, url))
        return await keeper.keep(await asyncio.to_thread(self._wanted))

    def _wanted(self) -> list[str]:
        with self.sessions() as session:
            return serving.wanted(session)

    def _forget_others(self, urls: list[str]) -> None:
        """Take replicas out of the tables that are not named, or found, any more, as since an earlier start."""
        self.keepers = {url: keeper for url, keeper in self.keepers.items() if url in urls}
        with self.sessions.begin() as session:
            if session.scalar(sa.select(sa.exists().where(Replica.url.not_in(urls)))):
                session.execute(sa.delete(Attestation).where(Attestation.replica.not_in(urls)))
                session.execute(sa.delete(Replica).where(Replica.url.not_in(urls)))


def main() -> None:
    """Run the reconciler as a process."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=4)
    run_until_stopped("reconciler", Reconciler(sessions, settings).run, settings, ReplicaCollector(sessions))


if __name__ == "__main__":
    main()
