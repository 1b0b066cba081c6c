"""Every replica proves again what it serves, seen from outside the reconciler, which mends what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy import audit, serving
from deploy.replica import ReplicaKeeper
from infra.db import Sessions
from infra.errors import IntegrityError, UnavailableError
from infra.fleet import addresses
from infra.settings import Settings

ACTOR = f"{audit.PLATFORM}attest"


@dataclass(frozen=True, slots=True)
class Checked:
    """What one replica shows of one release; `problem` is None where it is proved."""

    replica: str
    release: str
    problem: str | None
    differs_from_base: float | None = None


async def prove_again(sessions: Sessions, settings: Settings) -> list[Checked]:
    """Probe every replica for all that is wanted, and write nothing.

    Raises
    ------
    UnavailableError
        Code ``engine_unavailable`` where no replica answers at all.
    """
    with sessions() as session:
        wanted = serving.wanted(session)
    urls = await addresses(settings)
    found = [
        Checked(url, release, *shown)
        for url in urls
        for release, shown in (await _of(sessions, settings, url, wanted)).items()
    ]
    if not found:
        raise UnavailableError("No engine answers; `everloop status` shows the parts.", code="engine_unavailable")
    return found


async def _of(
    sessions: Sessions, settings: Settings, url: str, wanted: Sequence[str]
) -> dict[str, tuple[str | None, float | None]]:
    """Return what a replica shows; of one that does not answer nothing, which is for the reconciler to tell."""
    try:
        return await ReplicaKeeper(sessions, settings, url).check(wanted)
    except UnavailableError:
        return {}


def raise_alarm(sessions: Sessions, found: Sequence[dict[str, Any]]) -> None:
    """Write what is not proved into the audit log, and fail.

    Raises
    ------
    IntegrityError
        Code ``attestation_failed``.
    """
    failing = [row for row in found if row["problem"] is not None]
    if not failing:
        return
    with sessions.begin() as session:
        for row in failing:
            reason = f"{row['replica']}: {row['problem']}"
            audit.write(session, actor=ACTOR, action="attestation_failed", subject=row["release"], reason=reason)
    told = "; ".join(f"{row['release']} on {row['replica']}: {row['problem']}" for row in failing)
    raise IntegrityError(f"Not proved to be served: {told}.", code="attestation_failed")
