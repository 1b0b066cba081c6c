"""What deployment tells: the open canary, what engines have proved, and how the runs went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import sqlalchemy as sa
from prometheus_client import Counter
from sqlalchemy.orm import Session

from deploy import autonomy, head, runs, serving
from deploy.runs import TrainingRun
from deploy.tables import Attestation, Canary, CanaryEvent
from infra.telemetry.exposition import DatabaseCollector, Sample

OUTCOMES = ("canary", "held", "skipped", "failed", "cancelled")
ARMS = ("champion", "challenger")
UNPROVED, NOT_LOADED = "unproved", "not_loaded"

# The rows tell what fails now. One that was mended within a second by loading it again is seen here alone.
ATTESTATION_FAILURES = Counter(
    "everloop_attestation_failures",
    "Releases that did not prove to be served (unproved), or that could not be loaded or asked (not_loaded).",
    ["replica", "reason"],
)


def begin_failures(replica: str) -> None:
    """Have a replica's counts begin at nought: of a series that begins at one, Prometheus sees no increase."""
    for reason in (UNPROVED, NOT_LOADED):
        ATTESTATION_FAILURES.labels(replica, reason)


def drop_failures(replica: str) -> None:
    """Tell no more of a replica that is gone."""
    ATTESTATION_FAILURES.remove_by_labels({"replica": replica})


class CanaryCollector(DatabaseCollector):
    """The open canary: how long, and who has met it."""

    up = "everloop_canary_database_up"
    figures: ClassVar = {
        "everloop_canary_database_up": ("Whether the database answered.",),
        "everloop_canary_open": ("Whether a candidate is among users.",),
        "everloop_canary_opened_timestamp_seconds": ("When the open canary was opened.",),
        "everloop_canary_share": ("Share of users who meet the candidate.",),
        "everloop_canary_users": ("Users who were counted in the open canary.", "arm"),
        "everloop_canary_votes": ("Their votes.", "arm", "vote"),
        "everloop_proposals_open": ("Acts that wait for an operator's decision.",),
    }

    def read(self, session: Session) -> Iterator[Sample]:
        current = head.read(session)
        yield "everloop_proposals_open", {}, len(autonomy.open_proposals(session))
        yield "everloop_canary_open", {}, float(current.canary_id is not None)
        if current.canary_id is None:
            return
        opened_at = session.get_one(Canary, current.canary_id).opened_at
        yield "everloop_canary_opened_timestamp_seconds", {}, opened_at.timestamp()
        yield "everloop_canary_share", {}, current.share
        rows = session.execute(
            sa.select(CanaryEvent.arm, CanaryEvent.kind, CanaryEvent.good, sa.func.count())
            .where(CanaryEvent.canary_id == current.canary_id, CanaryEvent.kind.in_(["trial", "vote"]))
            .group_by(CanaryEvent.arm, CanaryEvent.kind, CanaryEvent.good)
        )
        counts = {(arm, kind, good): count for arm, kind, good, count in rows}
        for arm in ARMS:
            users = sum(n for (of, kind, _), n in counts.items() if (of, kind) == (arm, "trial"))
            yield "everloop_canary_users", {"arm": arm}, users
            for vote, good in (("good", True), ("bad", False)):
                yield "everloop_canary_votes", {"arm": arm, "vote": vote}, counts.get((arm, "vote", good), 0)


class ReplicaCollector(DatabaseCollector):
    """What each engine has proved of what it is to serve."""

    up = "everloop_attestation_database_up"
    figures: ClassVar = {
        "everloop_attestation_database_up": ("Whether the database answered.",),
        "everloop_replica_up": ("Whether the reconciler saw the engine up within two minutes.", "replica"),
        "everloop_replica_seen_timestamp_seconds": ("When the reconciler saw it last.", "replica"),
        "everloop_attestation_wanted": ("Releases that each engine is to hold.",),
        "everloop_attestation_proved": ("Of those, how many the engine has proved that it serves.", "replica"),
        "everloop_attestation_failing": ("Of those, how many it was found not to serve.", "replica"),
        "everloop_attestation_oldest_timestamp_seconds": ("When the oldest of its proofs was made.", "replica"),
    }

    def read(self, session: Session) -> Iterator[Sample]:
        wanted = serving.wanted(session)
        yield "everloop_attestation_wanted", {}, len(wanted)
        shown = session.scalars(sa.select(Attestation).where(Attestation.release.in_(wanted))).all()
        for replica, is_up in serving.replicas(session):
            label = {"replica": replica.url}
            own = [proof for proof in shown if proof.replica == replica.url]
            proved = [proof for proof in own if proof.problem is None]
            yield "everloop_replica_up", label, float(is_up)
            yield "everloop_replica_seen_timestamp_seconds", label, replica.seen_at.timestamp()
            yield "everloop_attestation_proved", label, len(proved)
            yield "everloop_attestation_failing", label, len(own) - len(proved) + (replica.problem is not None)
            if proved:
                oldest = min(proof.attested_at for proof in proved)
                yield "everloop_attestation_oldest_timestamp_seconds", label, oldest.timestamp()


class RunCollector(DatabaseCollector):
    """The newest training run, and whether one is in progress."""

    up = "everloop_run_database_up"
    figures: ClassVar = {
        "everloop_run_database_up": ("Whether the database answered.",),
        "everloop_run_in_progress": ("Whether a process trains now.",),
        "everloop_run_interrupted": ("Whether a run is recorded as running that no process has.",),
        "everloop_run_last_started_timestamp_seconds": ("When the newest run began.",),
        "everloop_run_last_ended_timestamp_seconds": ("When the last run ended, however it did.",),
        "everloop_run_last_outcome": ("1 for how the last run ended, 0 for all other ways.", "outcome"),
    }

    def read(self, session: Session) -> Iterator[Sample]:
        is_training = runs.is_training(session)
        newest = next(iter(runs.newest(session, 1)), None)
        ended = session.scalars(
            sa.select(TrainingRun)
            .where(TrainingRun.ended_at.is_not(None))
            .order_by(TrainingRun.ended_at.desc())
            .limit(1)
        ).first()
        yield "everloop_run_in_progress", {}, float(is_training)
        interrupted = newest is not None and newest.status == "running" and not is_training
        yield "everloop_run_interrupted", {}, float(interrupted)
        if newest is not None:
            yield "everloop_run_last_started_timestamp_seconds", {}, newest.started_at.timestamp()
        if ended is not None and ended.ended_at is not None:
            yield "everloop_run_last_ended_timestamp_seconds", {}, ended.ended_at.timestamp()
        for outcome in OUTCOMES:
            is_it = ended is not None and ended.status == outcome
            yield "everloop_run_last_outcome", {"outcome": outcome}, float(is_it)
