"""What replicas are to hold, what they have proved, and waiting until they have: the tables behind the hot swap."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from deploy import head, registry, variants
from deploy.runs import TrainingRun
from deploy.tables import Attestation, Replica, WantedRelease
from infra.db import Sessions, transaction
from infra.errors import ConflictError, UnavailableError
from infra.process import in_background
from infra.settings import BASE_MODEL_NAME

log = logging.getLogger("everloop.serving")

READY_TIMEOUT_S = 30.0
SEEN_WITHIN = timedelta(minutes=2)
WANTED_FOR = timedelta(minutes=10)
POLL_S = 0.05
READ_EVERY_S = 0.25


def wanted(session: Session) -> list[str]:
    """Return the releases that each replica is to hold, the most important first.

    The head's; the champion before, so that going back takes no longer than moving the head; those that are
    about to be named; candidates of runs that are still judged; and the base model, which every replica has.
    """
    current = head.read(session)
    names = [current.champion, current.challenger]
    with suppress(ConflictError):  # there is none yet
        names.append(head.previous_champion(session))
    names += session.scalars(sa.select(WantedRelease.release).where(WantedRelease.until > sa.func.now()))
    names += session.scalars(sa.select(TrainingRun.release).where(TrainingRun.status == "running"))
    names.append(BASE_MODEL_NAME)
    of = variants.all_variants(session)
    held = dict.fromkeys(of.get(name, name) for name in names if name)
    return [name for name in held if not registry.is_quarantined(session, name)]


def routes(session: Session) -> dict[str, dict[str, str]]:
    """Return, for each release, the addresses of the replicas that have proved it, and what each calls it."""
    proved: dict[str, dict[str, str]] = {}
    rows = session.execute(
        sa.select(Attestation.release, Attestation.replica, Attestation.served_as).where(
            Attestation.problem.is_(None)
        )
    )
    for release, replica, served_as in rows:
        proved.setdefault(release, {})[replica] = served_as
    return proved | {name: proved.get(of, {}) for name, of in variants.all_variants(session).items()}


def missing(session: Session, release: str, seen_after: datetime | None = None) -> dict[str, str]:
    """Return the replicas that are up and have not proved a release, with what is known of why.

    Parameters
    ----------
    seen_after
        Whoever was not looked at since then counts as one that has not.

    Raises
    ------
    UnavailableError
        Code ``engine_unavailable`` where none is up.
    """
    release = variants.weights_of(session, release)
    rows = session.execute(
        sa.select(Replica.url, Replica.seen_at, Attestation.release, Attestation.problem)
        .outerjoin(Attestation, sa.and_(Attestation.replica == Replica.url, Attestation.release == release))
        .where(_is_up())
    ).all()
    if not rows:
        raise UnavailableError("No engine is up; `everloop status` shows the parts.", code="engine_unavailable")
    lacking = {}
    for url, seen_at, proved, problem in rows:
        if proved is None or problem is not None:
            lacking[url] = problem or "it has not loaded it yet"
        elif seen_after is not None and seen_at <= seen_after:
            lacking[url] = "it has not been looked at since"
    return lacking


def is_ready(session: Session, release: str) -> bool:
    """Tell whether every replica that is up, and at least one, has proved a release."""
    try:
        return not missing(session, release)
    except UnavailableError:
        return False


def served_as(session: Session, release: str, replica: str) -> str:
    """Return what a replica calls a release that it has proved; the release's own name where it has not."""
    release = variants.weights_of(session, release)
    return (
        session.scalar(
            sa.select(Attestation.served_as).where(
                Attestation.release == release, Attestation.replica == replica, Attestation.problem.is_(None)
            )
        )
        or release
    )


def verdicts(session: Session, release: str) -> list[Attestation] | None:
    """Return what each replica that is up has shown of a release; None while one, or all, have shown nothing."""
    urls, release = _up(session), variants.weights_of(session, release)
    found = session.scalars(
        sa.select(Attestation).where(Attestation.release == release, Attestation.replica.in_(urls))
    ).all()
    return list(found) if urls and len(found) == len(urls) else None


def replicas(session: Session) -> list[tuple[Replica, bool]]:
    """Return the known replicas, each with whether it was seen up, and lately."""
    rows = session.execute(sa.select(Replica, _is_up()).order_by(Replica.url))
    return [(replica, is_up) for replica, is_up in rows]


class Shown(BaseModel):
    """What a replica has shown of a release.

    ``proved`` says that it serves it, ``problem`` why not; distances are means over a probe's tokens, in nats.
    """

    url: str
    is_up: bool
    proved: bool
    problem: str | None
    differs_from_base: float | None
    attested_at: datetime | None


def shown(session: Session, release: str) -> list[Shown]:
    """Return what each known replica has shown of a release.

    Raises
    ------
    NotFoundError
        Code ``release_not_found``.
    """
    name = variants.weights_of(session, registry.get_release(session, release).name)
    rows = session.execute(
        sa.select(Replica, _is_up().label("is_up"), Attestation)
        .outerjoin(Attestation, sa.and_(Attestation.replica == Replica.url, Attestation.release == name))
        .order_by(Replica.url)
    )
    return [
        Shown(
            url=replica.url,
            is_up=is_up,
            proved=proof is not None and proof.problem is None,
            problem=replica.problem or (proof.problem if proof else None),
            differs_from_base=proof.differs_from_base if proof else None,
            attested_at=proof.attested_at if proof else None,
        )
        for replica, is_up, proof in rows
    ]


def want(session: Session, release: str) -> None:
    """Have every replica hold a release for some minutes."""
    row = insert(WantedRelease).values(release=release, until=sa.func.now() + WANTED_FOR)
    session.execute(row.on_conflict_do_update(index_elements=["release"], set_={"until": row.excluded.until}))


def make_ready(sessions: Sessions, release: str, timeout_s: float | None = None) -> None:
    """Wait until every replica that is up, looked at since this was asked, has proved that it serves a release.

    What was proved before says nothing of an engine that died a moment ago.

    Raises
    ------
    UnavailableError
        Code ``release_not_ready`` where one has not in time (it says why), ``engine_unavailable``; who is
        served what has not changed.
    """
    with transaction(sessions) as session:
        name = registry.get_release(session, release).name
        want(session, name)
        at_first = _up(session)
        asked_at = session.scalar(sa.select(sa.func.clock_timestamp()))

    def look(session: Session) -> Look:
        gone = dict.fromkeys(at_first - _up(session), "it went away in the swap")
        lacking = gone or missing(session, name, asked_at)
        return Look(is_ready=not lacking, is_hopeless=bool(gone), lacking=lacking)

    _wait(sessions, look, f"{name} is not served by every replica", timeout_s)


def make_one_ready(sessions: Sessions, release: str) -> None:
    """Wait until any replica has proved that it serves a release, as mostly one has: who goes back is in a hurry.

    Replicas that have not get no request for it, so that one that is ill keeps nobody from going back.

    Raises
    ------
    UnavailableError
        Code ``release_not_ready``, ``engine_unavailable``; who is served what has not changed.
    """
    with transaction(sessions) as session:
        want(session, release)

    def look(session: Session) -> Look:
        lacking = missing(session, release)
        return Look(is_ready=len(lacking) < len(_up(session)), is_hopeless=False, lacking=lacking)

    _wait(sessions, look, f"{release} is served by no replica")


class Look(NamedTuple):
    """Whether what is waited for is there or cannot come any more, and which replicas lack it, with why."""

    is_ready: bool
    is_hopeless: bool
    lacking: Mapping[str, str]


def _wait(
    sessions: Sessions, look: Callable[[Session], Look], otherwise: str, timeout_s: float | None = None
) -> None:
    deadline_s = time.monotonic() + (READY_TIMEOUT_S if timeout_s is None else timeout_s)
    while True:
        with transaction(sessions) as session:
            seen = look(session)
        if seen.is_ready:
            return
        if seen.is_hopeless or time.monotonic() > deadline_s:
            why = "; ".join(f"{url}: {problem}" for url, problem in sorted(seen.lacking.items()))
            raise UnavailableError(f"{otherwise}, so nothing was changed. {why}", code="release_not_ready")
        time.sleep(POLL_S)


def _is_up() -> sa.ColumnElement[bool]:
    """A replica that was seen up, and lately: one that the reconciler does not look at any more is not counted."""
    return sa.and_(Replica.is_up, Replica.seen_at > sa.func.now() - SEEN_WITHIN)


def _up(session: Session) -> set[str]:
    return set(session.scalars(sa.select(Replica.url).where(_is_up())))


class RouteTable:
    """What is proved, as last read: a gateway asks it for each request."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._routes: dict[str, dict[str, str]] = {}

    def read(self) -> None:
        """Read the table anew."""
        with transaction(self.sessions) as session:
            self._routes = routes(session)

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Read it again and again for the length of the block; without a database, what it said last holds."""
        async with in_background(self._read_again()):
            yield

    async def _read_again(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.read)
            except UnavailableError:
                pass  # what it said last holds
            except Exception:
                log.exception("routes cannot be read")
            await asyncio.sleep(READ_EVERY_S)

    def __call__(self, release: str) -> Mapping[str, str]:
        """Return the replicas that have proved a release, and what each calls it."""
        return self._routes.get(release, {})
