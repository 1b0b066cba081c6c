"""What is looked after by schedule beside the nights: retention, erasures, proofs of what is served."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from prefect import flow

from deploy import attestation
from feedback import erasure
from flows import artifacts
from flows.housekeeping import keep_house
from flows.retries import step
from infra.db import Sessions, connect
from infra.errors import UnavailableError
from infra.settings import Settings, load
from infra.stack.renewal import renew_broker

LATE_AFTER = timedelta(minutes=10)  # a room that has not reported by then did not get the event, or gave it up
FINISH_TIMEOUT_S = 120.0
LEDGER_TIMEOUT_S = 120.0


@flow(name="retention", log_prints=True)  # type: ignore[untyped-decorator]
def retention() -> dict[str, Any] | None:
    """Delete what is past its time, as the ledger does once a minute, and tell what went."""
    settings = load()
    found: dict[str, Any] | None = prune(connect(settings.need("database_url"), pool_size=2), settings)
    if found is None:
        print("the ledger is at it")
        return None
    rows = [{"what": what, "number": len(n) if isinstance(n, list) else n} for what, n in found.items()]
    artifacts.table("retention", rows, "What was deleted, and adapters that no row names (orphans)")
    artifacts.page(settings, "releases", "/releases", "Releases, and whose files are gone")
    print(found)
    if held_mib := renew_broker(settings):
        print(f"the broker held {held_mib:.0f} MiB and is started anew")
    return found


@step
def prune(sessions: Sessions, settings: Settings) -> dict[str, Any] | None:
    """Keep house; where the ledger does so in this moment, after it."""
    until_s = time.monotonic() + LEDGER_TIMEOUT_S
    while (found := keep_house(sessions, settings)) is None and time.monotonic() < until_s:
        time.sleep(1.0)
    return found


@flow(name="erasure", log_prints=True)  # type: ignore[untyped-decorator]
def finish_erasures() -> list[dict[str, Any]]:
    """Finish every erasure that a room has not reported, and fail where one cannot be finished."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=2)
    found: list[dict[str, Any]] = send_again(sessions)
    if found:
        left = wait_for_rooms(sessions, [row["erasure_id"] for row in found])
        artifacts.table("erasures", [row | {"pending": left[row["erasure_id"]]} for row in found], "Late erasures")
        if any(left.values()):
            raise UnavailableError(
                "An erasure is still not finished by every room; see the table `erasures` of this run, `everloop "
                "status` and `everloop log dead list`.",
                code="erasure_pending",
            )
    print(f"{len(found)} erasures were unfinished")
    return found


@step
def send_again(sessions: Sessions) -> list[dict[str, Any]]:
    """Have all rooms erase once more what one of them has not; return which erasures."""
    with sessions.begin() as session:
        return erasure.send_again(session, LATE_AFTER)


def wait_for_rooms(sessions: Sessions, erasure_ids: list[str]) -> dict[str, list[str]]:
    """Return the rooms that have still not reported, by erasure, after a while at most."""
    until_s = time.monotonic() + FINISH_TIMEOUT_S
    while True:
        with sessions() as session:
            left = {erasure_id: erasure.get(session, erasure_id)["pending"] for erasure_id in erasure_ids}
        if not any(left.values()) or time.monotonic() > until_s:
            return left
        time.sleep(1.0)


@flow(name="attest", log_prints=True)  # type: ignore[untyped-decorator]
def attest() -> list[dict[str, Any]]:
    """Have every replica prove again what it serves, and fail where one cannot."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    found: list[dict[str, Any]] = prove_again(sessions, settings)
    artifacts.table("proofs", found, "Each release on each replica; a problem is no proof")
    artifacts.page(settings, "served", "/releases", "What is served")
    attestation.raise_alarm(sessions, found)
    print(f"{len(found)} proofs hold")
    return found


@step
def prove_again(sessions: Sessions, settings: Settings) -> list[dict[str, Any]]:
    """Probe each replica for each release that is wanted; an engine that is away is waited for."""
    return [asdict(row) for row in asyncio.run(attestation.prove_again(sessions, settings))]
