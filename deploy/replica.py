"""One replica: what it holds is made what it should hold, and proved.

What an engine has cached goes by names. So where something else was served under a name, the release is loaded
again as ``NAME~2``, and nothing that was computed with the wrong weights is used for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from deploy import attest, audit, registry
from deploy.attest import Proof
from deploy.metrics import ATTESTATION_FAILURES, NOT_LOADED, UNPROVED, begin_failures
from deploy.runs import TrainingRun
from deploy.tables import Attestation, Release, Replica
from infra.db import Sessions
from infra.engine import EngineClient
from infra.engine_wire import MODEL_GONE
from infra.errors import EverloopError, UnavailableError
from infra.settings import BASE_MODEL_NAME, Settings

log = logging.getLogger("everloop.reconciler")

PROVE_AGAIN_S = 30.0
LOAD_TIMEOUT_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# An answer begun on a release may still be running when the head moves: keep what nobody wants for so long.
KEEP_S = 1800.0
AGAIN = "~"
ACTOR = f"{audit.PLATFORM}reconciler"


class ReplicaKeeper:
    """Keeps one replica holding what is wanted.

    Parameters
    ----------
    url
        Its address, which is also its name in the tables.
    """

    def __init__(self, sessions: Sessions, settings: Settings, url: str) -> None:
        self.sessions = sessions
        self.settings = settings
        self.url = url
        self._unwanted_since_s: dict[str, float] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._base_probe: list[float] | None = None
        self._version: tuple[float | None, str | None] | None = None  # of the engine that began when

    async def keep(self, wanted: Sequence[str]) -> list[str]:
        """Make one round; return the releases that were proved in it."""
        begin_failures(self.url)
        async with EngineClient(self.url, self.settings.engine_key, timeout_s=LOAD_TIMEOUT_S) as engine:
            try:
                started_at_s, held = await engine.started_at_s(), await engine.models()
                if self._version is None or self._version[0] != started_at_s:
                    self._version = started_at_s, await engine.version()
            except EverloopError as error:
                await self._in_thread(self._note_down, error.message)
                return []
            rows = await self._in_thread(self._note_up, started_at_s, held)
            proved = []
            for name in wanted:
                if self._is_due(name, rows.get(name)):
                    proved += await self._prove(engine, name, rows.get(name), held)
            for served_as in await self._in_thread(self._expired, held, wanted):
                with suppress(EverloopError):
                    await engine.unload_adapter(served_as)
                    log.info("%s: unloaded %s", self.url, served_as)
        return proved

    async def check(self, wanted: Sequence[str]) -> dict[str, tuple[str | None, float | None]]:
        """Probe what it is said to serve, and write nothing.

        Returns
        -------
        dict
            By release: why it is not proved (None where it is), and its distance to the base model.

        Raises
        ------
        UnavailableError
            It does not answer.
        """
        found: dict[str, tuple[str | None, float | None]] = {}
        async with EngineClient(self.url, self.settings.engine_key, timeout_s=LOAD_TIMEOUT_S) as engine:
            self._version = await engine.started_at_s(), await engine.version()
            rows = await self._in_thread(self._attested)
            for name in wanted:
                row = rows.get(name)
                if row is None or row.problem is not None:
                    found[name] = (row.problem if row is not None else "it was never proved", None)
                    continue
                proof = await self._probe(engine, name, row.served_as)
                if proof.is_doubtful:
                    self._base_probe = None
                    proof = await self._probe(engine, name, row.served_as)
                found[name] = (proof.problem, proof.differs_from_base)
        return found

    def _attested(self) -> dict[str, Attestation]:
        with self.sessions() as session:
            rows = session.scalars(sa.select(Attestation).where(Attestation.replica == self.url))
            return {row.release: row for row in rows}

    def _is_due(self, name: str, row: Attestation | None) -> bool:
        if row is not None and row.problem is None:
            return (time.time() - row.attested_at.timestamp()) > PROVE_AGAIN_S
        _, not_before_s = self._failures.get(name, (0, 0.0))
        return time.monotonic() >= not_before_s

    async def _prove(self, engine: EngineClient, name: str, row: Attestation | None, held: list[str]) -> list[str]:
        """Load a release where it is missing, and prove it; what cannot be proved is taken out again."""
        is_held = row is not None and row.problem is None
        served_as = row.served_as if row is not None and is_held else name
        try:
            if not is_held and name != BASE_MODEL_NAME:
                served_as = await self._load(engine, name, held)
            proof = await self._probe(engine, name, served_as)
            if proof.is_doubtful:
                self._base_probe = None
                proof = await self._probe(engine, name, served_as)
        except UnavailableError as error:
            # One that is away, or busy, has said nothing against what it has proved before.
            if not is_held or error.code == MODEL_GONE:
                await self._in_thread(self._failed, name, served_as, error.message)
            return []
        except Exception as error:  # of this release alone: the others are looked at all the same
            code = f" [{error.code}]" if isinstance(error, EverloopError) else ""
            log.error("%s: %s is not served: %s%s", self.url, name, error, code)
            await self._in_thread(self._failed, name, served_as, str(error))
            return []
        await self._in_thread(self._note, name, served_as, proof)
        if proof.problem is None:
            self._failures.pop(name, None)
            return [name]
        log.error("%s: %s is not proved: %s", self.url, name, proof.problem)
        ATTESTATION_FAILURES.labels(self.url, UNPROVED).inc()
        self._wait_before(name)
        if name != BASE_MODEL_NAME:
            await self._in_thread(self._spoil, name, proof.problem)
            with suppress(EverloopError):  # nobody is sent to it in any case
                await engine.unload_adapter(served_as)
        return []

    def _spoil(self, name: str, problem: str) -> None:
        with self.sessions.begin() as session:
            replica = session.get_one(Replica, self.url, with_for_update=True)
            before = replica.spoiled.get(name, 0)
            replica.spoiled = {**replica.spoiled, name: before + 1}
            if not before:
                reason = f"{self.url}: {problem}; it is loaded again under another name"
                audit.write(session, actor=ACTOR, action="unproved", subject=name, reason=reason)

    async def _load(self, engine: EngineClient, name: str, held: list[str]) -> str:
        """Load a release under a name that has meant nothing else in this life of the engine; return that name."""
        served_as, path = await self._in_thread(self._placed, name)
        if served_as not in held:
            await engine.load_adapter(served_as, path)
            log.info("%s: loaded %s", self.url, served_as)
        return str(served_as)

    def _placed(self, name: str) -> tuple[str, Any]:
        """Return what to call a release, and where its files are, each checked now."""
        with self.sessions() as session:
            path = registry.verified_path(session, self.settings, name)
            num_spoiled = session.get_one(Replica, self.url).spoiled.get(name, 0)
        return (f"{name}{AGAIN}{num_spoiled + 1}" if num_spoiled else name), path

    async def _probe(self, engine: EngineClient, name: str, served_as: str) -> Proof:
        if name == BASE_MODEL_NAME or self._base_probe is None:
            self._base_probe = await attest.probe(engine, BASE_MODEL_NAME)
        own = self._base_probe if name == BASE_MODEL_NAME else await attest.probe(engine, served_as)
        reference, others = await self._in_thread(self._references, name)
        base = None if name == BASE_MODEL_NAME else self._base_probe
        return attest.prove(own, base, others, reference)

    def _references(self, name: str) -> tuple[list[float] | None, dict[str, list[float]]]:
        """Return a release's own probe as first proved, and those of the others that any replica serves."""
        with self.sessions() as session:
            serving = sa.select(Attestation.release).where(Attestation.problem.is_(None))
            on_this_base = Release.probe_base == self._probed_on()
            rows = session.execute(
                sa.select(Release.name, Release.probe).where(
                    on_this_base, sa.or_(Release.name == name, Release.name.in_(serving))
                )
            )
            probes = {row.name: row.probe for row in rows}
        probes.pop(BASE_MODEL_NAME if name != BASE_MODEL_NAME else "", None)
        return probes.pop(name, None), probes

    def _probed_on(self) -> str:
        """Return what a probe rests on: another base model or engine gives a release other log-probabilities."""
        version = self._version[1] if self._version else None
        return f"{registry.present_base(self.settings)} vllm {version}"

    def _note_down(self, problem: str) -> None:
        values = {"is_up": False, "problem": problem}
        with self.sessions.begin() as session:
            self._upsert(session, values)

    def _note_up(self, started_at_s: float | None, held: list[str]) -> dict[str, Attestation]:
        """Record that it is up, and take back every proof of what it does not hold any more; return the others."""
        with self.sessions.begin() as session:
            before = session.get(Replica, self.url)
            values: dict[str, Any] = {"is_up": True, "problem": None, "started_at_s": started_at_s}
            if before is None or before.started_at_s != started_at_s:  # another life, in which nothing is proved
                values["spoiled"] = {}
                self._base_probe = None
                self._failures.clear()
                session.execute(sa.delete(Attestation).where(Attestation.replica == self.url))
            self._upsert(session, values)
            session.execute(
                sa.delete(Attestation).where(
                    Attestation.replica == self.url,
                    Attestation.problem.is_(None),
                    Attestation.served_as.not_in(held),
                )
            )
            rows = session.scalars(sa.select(Attestation).where(Attestation.replica == self.url)).all()
            return {row.release: row for row in rows}

    def _upsert(self, session: Session, values: Mapping[str, Any]) -> None:
        row = insert(Replica).values(url=self.url, **{"spoiled": {}, **values})
        session.execute(
            row.on_conflict_do_update(index_elements=["url"], set_={**values, "seen_at": sa.func.now()})
        )

    def _failed(self, name: str, served_as: str, problem: str) -> None:
        self._wait_before(name)
        ATTESTATION_FAILURES.labels(self.url, NOT_LOADED).inc()
        self._note(name, served_as, Proof([], None, None, None, problem))

    def _wait_before(self, name: str) -> None:
        number, _ = self._failures.get(name, (0, 0.0))
        pause_s = min(FIRST_PAUSE_S * 2.0**number, LONGEST_PAUSE_S)
        self._failures[name] = (number + 1, time.monotonic() + pause_s)

    def _note(self, name: str, served_as: str, proof: Proof) -> None:
        with self.sessions.begin() as session:
            release = session.scalars(sa.select(Release).where(Release.name == name)).one_or_none()
            if release is None:  # taken back meanwhile
                return
            if proof.problem is None and proof.disagrees is None:
                release.probe, release.probe_base = proof.probe, self._probed_on()
            values = {**asdict(proof), "served_as": served_as, "adapter_digest": release.adapter_digest}
            if proof.probe:  # it has answered: a round of many proofs is long
                session.execute(sa.update(Replica).where(Replica.url == self.url).values(seen_at=sa.func.now()))
            row = insert(Attestation).values(release=name, replica=self.url, **values)
            session.execute(
                row.on_conflict_do_update(
                    index_elements=["release", "replica"], set_={**values, "attested_at": sa.func.now()}
                )
            )

    def _expired(self, held: list[str], wanted: Sequence[str]) -> list[str]:
        """Return what it holds that is to go: quarantined now, or wanted by nobody for long.

        Names that are not ours are left alone. A run that has not ended wants its own: it is judged before the head
        names it.
        """
        names = {served_as: served_as.partition(AGAIN)[0] for served_as in held}
        with self.sessions() as session:
            ours = set(session.scalars(sa.select(Release.name).where(Release.adapter_digest.is_not(None))))
            judged = set(session.scalars(sa.select(TrainingRun.release).where(TrainingRun.status == "running")))
            unwanted = {served_as: name for served_as, name in names.items() if name in ours - judged - set(wanted)}
            at_once = [s for s, name in unwanted.items() if registry.is_quarantined(session, name)]
        now_s = time.monotonic()
        self._unwanted_since_s = {s: self._unwanted_since_s.get(s, now_s) for s in unwanted}
        late = [s for s, since_s in self._unwanted_since_s.items() if now_s - since_s > KEEP_S]
        return list(dict.fromkeys([*at_once, *late]))

    @staticmethod
    async def _in_thread(act: Any, *args: Any) -> Any:
        return await asyncio.to_thread(act, *args)
