"""A canary from its opening to its end: looks at what has settled, and does what the evidence decides.

The decision itself is :mod:`deploy.rollout`; what it rests on is :mod:`deploy.journal`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit, autonomy, head, journal, registry, rollout, serving
from deploy.rollout import Arm, Event, Guardrail, Plan, Rollout
from deploy.runs import TrainingRun
from deploy.tables import Canary, CanaryEvent
from feedback.tables import Episode
from infra.db import Sessions
from infra.errors import ConflictError, IntegrityError, NotFoundError
from infra.settings import Settings

ACTOR = f"{audit.PLATFORM}canary"
LENGTH_GATE = "median_words"
LOOK_EVERY_S = 1.0
WATCH_LOCK = "watch-canary"  # held by whoever looks
RECENT_ANSWERS = 200
MAX_POINTS = 1000
SLOW_QUANTILE = 0.9
# A tenth of the budget of a rollback goes to them; margins leave room for what an improvement may change.
GUARDRAILS = (
    Guardrail(name=journal.FAILED, margin=0.02, alpha_share=0.02),
    Guardrail(name=journal.SLOW, margin=0.15, alpha_share=0.02),
    Guardrail(name=journal.UNUSUAL_LENGTH, margin=0.25, alpha_share=0.02),
    Guardrail(name=journal.REFUSED, margin=0.10, alpha_share=0.02),
    Guardrail(name=journal.UNRATED, margin=0.20, alpha_share=0.02),
)


def plan(
    session: Session, settings: Settings, gates: Sequence[dict[str, Any]] = (), share: float | None = None
) -> Plan:
    """Return how the next candidate is to be tried.

    Parameters
    ----------
    gates
        The candidate's gates, as they are kept: what people's lengths are is taken from there.
    share
        The only share of users who meet it, instead of the setting's steps.
    """
    words = next(((g["low"], g["high"]) for g in gates if g["gate"] == LENGTH_GATE), None)
    return Plan(
        steps=(share,) if share else settings.canary_steps,
        alpha=settings.canary_alpha,
        candidate=_since_promotion(session) + 1,
        step_users=settings.canary_step_users,
        step_s=settings.canary_step_s,
        max_s=settings.canary_max_s,
        guardrails=GUARDRAILS,
        slow_ms=_slow_ms(session),
        words=words,
    )


def _since_promotion(session: Session) -> int:
    """Return how many canaries since the last promotion have spent of alpha: those that anybody met."""
    promoted = sa.select(sa.func.max(Canary.id)).where(Canary.decision == "promote").scalar_subquery()
    counted = sa.exists().where(CanaryEvent.canary_id == Canary.id, CanaryEvent.kind.in_(("trial", "vote")))
    spent = sa.select(sa.func.count()).where(Canary.id > sa.func.coalesce(promoted, 0), counted)
    return session.scalar(spent) or 0


def _slow_ms(session: Session) -> float | None:
    """Return what nine of ten recent answers took less than; None where there are none."""
    recent = (
        sa.select(Episode.latency_ms)
        .where(Episode.arm == "champion", Episode.status == "complete")
        .order_by(Episode.created_at.desc())
        .limit(RECENT_ANSWERS)
        .subquery()
    )
    return session.scalar(sa.select(sa.func.percentile_cont(SLOW_QUANTILE).within_group(recent.c.latency_ms)))


def get(session: Session, canary_id: int) -> Canary:
    """Return a canary.

    Raises
    ------
    NotFoundError
        Code ``canary_not_found``.
    """
    canary = session.get(Canary, canary_id)
    if canary is None:
        raise NotFoundError(f"There is no canary {canary_id}.", code="canary_not_found")
    return canary


def newest(session: Session, limit: int) -> list[Canary]:
    """Return canaries, the newest first."""
    return list(session.scalars(sa.select(Canary).order_by(Canary.id.desc()).limit(limit)))


def gates_before(session: Session, release: str) -> list[dict[str, Any]]:
    """Return the gates that a release was judged by in its run; none where it never was."""
    run = session.scalars(
        sa.select(TrainingRun.result["gates"]).where(
            TrainingRun.release == release, TrainingRun.result["gates"].is_not(None)
        )
    ).first()
    return list(run or [])


def recompute(session: Session, canary: Canary) -> Rollout:
    """Return a canary as its log has it."""
    return rollout.replay(Plan.model_validate(canary.plan), journal.read(session, canary.id))


@dataclass(frozen=True, slots=True)
class Point:
    """A canary at one of its events: e-values by test, and the share of good votes by arm."""

    at_s: float
    e: dict[str, float]
    good: dict[Arm, float | None]


@dataclass(slots=True)
class Follower:
    """Keeps what it has computed of a canary, so that only new events are computed.

    Attributes
    ----------
    canary_id, num_events
        Of which canary, and after how many of its events, `rollout` is.
    points
        The way there, thinned.
    """

    canary_id: int | None = None
    num_events: int = 0
    rollout: Rollout | None = None
    points: list[Point] = field(default_factory=list)
    _stride: int = 1

    def catch_up(self, session: Session, canary: Canary) -> Rollout:
        """Return a canary as its log has it by now."""
        if self.rollout is None or self.canary_id != canary.id:
            self.canary_id, self.num_events = canary.id, 0
            self.points, self._stride = [], 1
            self.rollout = Rollout(Plan.model_validate(canary.plan))
        for event in journal.read(session, canary.id, self.num_events):
            self.rollout.apply(event)
            self.num_events += 1
            self._note(event, self.rollout)
        return self.rollout

    def _note(self, event: Event, current: Rollout) -> None:
        """Keep a point of the way; where there are too many, every second one."""
        if self.num_events % self._stride:
            return
        tests = {name: test.e for name, test in current.tests.items()}
        good = {arm: tally.good / tally.votes if tally.votes else None for arm, tally in current.tallies.items()}
        self.points.append(Point(event.at_s, tests, good))
        if len(self.points) > MAX_POINTS:
            del self.points[::2]
            self._stride *= 2


@dataclass(slots=True)
class Watch:
    """Looks at the open canary again and again."""

    sessions: Sessions
    settings: Settings
    follower: Follower = field(default_factory=Follower)

    def look(self) -> str | None:
        """Look once, and do what is decided; return how the canary ended, or None while it is open."""
        try:
            with self.sessions.begin() as session:
                return self._look(session)
        except Exception as error:
            self.follower = Follower()  # what it has computed rests on events that were not committed
            if isinstance(error, ConflictError):  # an operator was quicker
                return error.message
            raise

    def _look(self, session: Session) -> str | None:
        registry.lock_head(session)  # before the canary, as whoever moves the head does
        canary_id = head.read(session).canary_id
        if canary_id is None:
            return "no canary is open"
        canary = session.get_one(Canary, canary_id, with_for_update=True)
        if broken := _unservable(session, self.settings, canary.challenger):
            current = recompute(session, canary)
            close(session, canary, current, "unservable", actor=ACTOR, reason=broken)
            return f"canary {canary_id}: unservable: {broken}"
        journal.collect(session, canary, self.settings.canary_settle_s)
        current = self.follower.catch_up(session, canary)
        elapsed_s = time.time() - canary.opened_at.timestamp()
        may_step = autonomy.may(session, self.settings, "canary")
        if current.is_due(elapsed_s, may_step=may_step):
            journal.append(session, canary_id, [Event(elapsed_s, "tick")])
            current = self.follower.catch_up(session, canary)
        return act(session, self.settings, canary, current)


def _unservable(session: Session, settings: Settings, challenger: str) -> str | None:
    """Return why a challenger cannot be served any more, as after a change of the base model, or None."""
    try:
        registry.check_servable(session, settings, challenger)
    except IntegrityError as error:
        return error.message
    return None


def act(session: Session, settings: Settings, canary: Canary, current: Rollout) -> str | None:
    """Do what a canary's evidence has decided, as far as the platform may; return how it ended, if it did."""
    if current.is_held:
        return None
    reason = current.sentence()
    if current.decision is None:
        share = head.read(session).share
        if current.share != share:
            reason = f"{current.plan.step_users} users have met it without sign of harm: {reason}"
            head.step_canary(session, canary.id, current.share, actor=ACTOR, reason=reason)
        return None
    if current.decision == "promote" and not serving.is_ready(session, canary.challenger):
        return None  # a replica is being mended; nobody is sent to one that does not serve it
    if current.decision == "promote" and not autonomy.may(session, settings, "promote"):
        autonomy.propose(session, settings, "promote", canary.challenger, actor=ACTOR, reason=reason)
        return None
    if current.decision == "rollback" and not autonomy.may(session, settings, "rollback"):
        return None
    close(session, canary, current, current.decision, actor=ACTOR, reason=reason)
    return f"canary {canary.id}: {current.decision}: {reason}"


def close(session: Session, canary: Canary, current: Rollout, decision: str, *, actor: str, reason: str) -> None:
    """End a canary with its evidence."""
    head.close_canary(
        session, canary.id, decision=decision, evidence=current.evidence(), actor=actor, reason=reason
    )


def abort(session: Session, canary_id: int, *, actor: str, reason: str) -> None:
    """End an open canary by an operator's decision; the champion stays."""
    head.check_reason(reason)
    registry.lock_head(session)
    canary = get(session, canary_id)
    close(session, canary, recompute(session, canary), "aborted", actor=actor, reason=reason)


def hold(session: Session, canary_id: int, kind: Literal["hold", "resume"], *, actor: str, reason: str) -> None:
    """Stop automatic decisions about an open canary, or let them go on; its users stay, and it goes on counting."""
    head.check_reason(reason)
    canary = get(session, canary_id)
    session.refresh(canary, with_for_update=True)
    if canary.decision is not None:
        raise ConflictError(f"Canary {canary_id} is no longer open.", code="canary_closed")
    at_s = max(time.time() - canary.opened_at.timestamp(), 0.0)
    journal.append(session, canary_id, [Event(at_s, kind)])
    action = {"hold": "canary_held", "resume": "canary_resumed"}[kind]
    audit.write(session, actor=actor, action=action, subject=canary.challenger, reason=reason)
