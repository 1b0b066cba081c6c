"""A policy that is served while it trains: each version of its adapter under an immutable name.

The names are ``run/RUN@VERSION``. The engine keeps cached prefixes of a name that is loaded again with other
weights (vllm#42125), so no name is ever used twice, also not by the process that goes on with a killed run or by
another of its processes, and what a sample came from can always be told.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from infra.engine import RUN_PREFIX, EngineClient
from infra.errors import EverloopError
from infra.files import write_whole
from trainer import processes
from trainer.rollout import PATIENCE_S, patiently

log = logging.getLogger("everloop.training")

POLICY_DIR = "policy"
VERSION_FILE = "policy-version"  # the last number that was given


class ServedPolicy:
    """Versions of one run's adapter on the engine.

    Parameters
    ----------
    keep
        Versions that stay loaded: the newest, and those before it that samples may still be asked of.

    Attributes
    ----------
    version
        The newest that this object has published; 0 before the first.
    """

    def __init__(self, engine_url: str, run_dir: Path, keep: int = 1, engine_key: str | None = None) -> None:
        self.engine_url, self._engine_key = engine_url, engine_key
        self.run_id = run_dir.name
        self.directory = run_dir / POLICY_DIR
        self.keep = keep
        self._version_file = run_dir / VERSION_FILE
        self.version = 0
        self._loaded: list[int] = []

    def client(self) -> EngineClient:
        """Return a new client of the engine."""
        return EngineClient(self.engine_url, self._engine_key)

    @property
    def name(self) -> str:
        """What the engine calls the newest version."""
        return self.name_of(self.version)

    def name_of(self, version: int) -> str:
        """Return what the engine calls a version."""
        return f"{RUN_PREFIX}{self.run_id}@{version}"

    def lag(self, name: str) -> int:
        """Return how many versions the newest is ahead of the one of this name."""
        return self.version - int(name.rpartition("@")[2])

    def publish(self, save: Callable[[Path], None], *, patience_s: float = PATIENCE_S) -> None:
        """Serve a new version.

        Parameters
        ----------
        save
            Writes the adapter into a directory.
        patience_s
            How long an engine that is away is waited for.

        Raises
        ------
        UnavailableError
            It was away for longer.
        """
        is_first = not self.version
        version = self._next_version()
        directory = self.directory / str(version)
        save(directory)
        if not processes.is_main():  # of several that train together one tells the engine
            self.version = version
            return

        async def load() -> None:
            async with self.client() as engine:
                if is_first:
                    await patiently(partial(self._unload_all, engine), patience_s=patience_s)
                loads = partial(engine.load_adapter, self.name_of(version), directory)
                await patiently(loads, patience_s=patience_s)
                self._loaded.append(version)
                self.version = version
                for old in self._loaded[: -self.keep]:
                    await self._unload(engine, old)
                del self._loaded[: -self.keep]

        asyncio.run(load())

    async def restore(self, engine: EngineClient) -> None:
        """Load what an engine that was started anew has lost, under the old names: the weights are the same."""
        held = await engine.models()
        for version in list(self._loaded):  # another thread may publish
            if self.name_of(version) not in held:
                await engine.load_adapter(self.name_of(version), self.directory / str(version))

    def _next_version(self) -> int:
        """Return a number that no process of this run has given before."""
        if not processes.is_main():
            return self.version + 1  # it names nothing: the main process serves
        last = int(self._version_file.read_text()) if self._version_file.exists() else 0
        write_whole(self._version_file, str(last + 1))
        return last + 1

    def close(self) -> None:
        """Take every version from the engine; where it does not answer, it has been told nothing."""

        async def unload() -> None:
            async with self.client() as engine:
                with suppress(EverloopError):  # the engine is away, and comes back without any of them
                    await self._unload_all(engine)
            self._loaded.clear()

        if self._loaded:
            asyncio.run(unload())
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _unload(self, engine: EngineClient, version: int) -> None:
        try:
            await engine.unload_adapter(self.name_of(version))
        except EverloopError as error:  # the engine restarted, and has none of them
            log.warning("%s was not unloaded: %s", self.name_of(version), error.code)
        shutil.rmtree(self.directory / str(version), ignore_errors=True)

    async def _unload_all(self, engine: EngineClient) -> None:
        """Take all runs' versions from the engine: one trains at a time, so what is not ours is of a dead one."""
        for name in await engine.models():
            if name.startswith(RUN_PREFIX):
                await engine.unload_adapter(name)
