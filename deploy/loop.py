"""The loop as an operator sees it at one moment: each part with its rate, its lag and its health; and what waits.

Every figure is served by an index or a small table, so that it costs the same with a million episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import autonomy, canary, head, runs, serving
from deploy.rollout import Rollout
from deploy.runs import TrainingRun
from deploy.tables import AuditEntry, Replica
from feedback.tables import Episode, Feedback
from infra.errors import ConflictError
from infra.ids import first_id
from infra.log import metrics
from infra.log.metrics import LogStatus
from infra.settings import Settings
from reward import CONSUMER, report, state

Health = Literal["good", "busy", "idle", "trouble"]
RECENT = timedelta(minutes=5)
MAX_WAIT_S = 10.0
MAX_LAG_RECORDS = 1000
MAX_FAILED_SHARE = 0.05
ENDED = {
    "canary": "candidate found",
    "held": "held by its gates",
    "skipped": "too little new",
    "failed": "last run failed",
    "cancelled": "cancelled",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the loop.

    Attributes
    ----------
    figure
        The one number to look at, with its unit.
    detail
        What else is to be known, in some words.
    """

    name: str
    health: Health
    figure: str
    detail: str
    path: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that waits for an operator."""

    title: str
    detail: str
    path: str
    proposal_id: int | None = None
    release: str | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Now:
    """What parts and decisions are told from, read once.

    Attributes
    ----------
    rolls_back_to, yesterday
        Where a rollback goes that names nothing; the champion of this time yesterday, where it was another.
    changed
        The act that made the champion one.
    replicas
        The engines, each with whether it was seen up lately.
    rollout
        The open canary as its log has it, if one is open.
    """

    champion: str
    challenger: str | None
    share: float
    rolls_back_to: str | None
    changed: AuditEntry | None
    yesterday: str | None
    replicas: list[tuple[Replica, bool]]
    rollout: Rollout | None
    log: LogStatus
    newest_run: TrainingRun | None


def read(session: Session, rollout: Rollout | None) -> Now:
    """Return who is served what and why, and the state of what serves and learns."""
    current = head.read(session)
    changed = session.scalars(
        sa.select(AuditEntry)
        .where(head.champion_after == current.champion, head.champion_before != current.champion)
        .order_by(AuditEntry.id.desc())
        .limit(1)
    ).first()
    return Now(
        champion=current.champion,
        challenger=current.challenger,
        share=current.share,
        rolls_back_to=rolls_back_to(session),
        changed=changed,
        yesterday=_a_day_ago(session, current.champion),
        replicas=serving.replicas(session),
        rollout=rollout,
        log=metrics.read(session),
        newest_run=next(iter(runs.newest(session, 1)), None),
    )


def _a_day_ago(session: Session, now: str) -> str | None:
    """Return the champion of this time yesterday; None where it was the same, or none is known."""
    entry = (
        sa.select(head.champion_after)
        .where(head.champion_after.is_not(None), AuditEntry.created_at < sa.func.now() - timedelta(days=1))
        .order_by(AuditEntry.id.desc())
        .limit(1)
    )
    champion = session.scalar(entry)
    return champion if champion != now else None


def rolls_back_to(session: Session) -> str | None:
    """Return where a rollback goes that names nothing; None where there is nothing to go back to."""
    try:
        return head.previous_champion(session)
    except ConflictError:
        return None


def parts(session: Session, settings: Settings, now: Now) -> list[Part]:
    """Return the parts in the order in which data goes round."""
    return [
        _people(session),
        _log(now.log),
        _reward(session, now.log),
        _training(session, settings, now.newest_run),
        _gate(runs.newest_judged(session)),
        _canary(session, now),
        _champion(now),
    ]


def _people(session: Session) -> Part:
    since = _time(session) - RECENT
    failed = sa.func.count().filter(Episode.status == "failed")
    answers, num_failed, people = session.execute(
        sa.select(sa.func.count(), failed, sa.func.count(Episode.user_id.distinct())).where(
            Episode.id >= first_id("ep", since)
        )
    ).one()
    signals = session.scalar(
        sa.select(sa.func.count()).select_from(Feedback).where(Feedback.id >= first_id("fb", since))
    )
    per_minute = RECENT.total_seconds() / 60.0
    health: Health = "idle" if not answers else "trouble" if num_failed > MAX_FAILED_SHARE * answers else "good"
    told = f"{_plural(people, 'person', 'people')}, {_plural(signals or 0, 'signal', 'signals')} in 5 min"
    if num_failed:
        told += f", {num_failed} answers failed"
    return Part("People", health, f"{answers / per_minute:.1f} answers/min", told, "/operate/feedback")


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _log(log: LogStatus) -> Part:
    dead = sum(log.dead_letters.values())
    waits = log.oldest_waiting_s > MAX_WAIT_S
    health: Health = "trouble" if dead or waits else "good"
    told = f"oldest waits {log.oldest_waiting_s:.1f} s" if log.num_waiting else "nothing waits"
    if dead:
        told += f", {dead} dead letters"
    return Part("Log", health, f"{log.num_waiting} events to send", told, "/operate/learning#log")


def _reward(session: Session, log: LogStatus) -> Part:
    lag = sum(row.records for row in log.lags if row.consumer == CONSUMER)
    newest = report.newest_state(session)
    if newest is None:
        return Part("Reward", "idle", f"{lag} events behind", "nothing learned yet", "/operate/learning")
    guards = state.read_guards(session, newest.encoder)
    health: Health = "trouble" if lag > MAX_LAG_RECORDS else "good"
    ece = guards.calibration.used.ece
    told = f"{newest.update_seq} updates"
    if ece is not None:
        told += f", off by {100 * ece:.1f} points on average"
    return Part("Reward", health, f"{lag} events behind", told, "/operate/learning")


def _training(session: Session, settings: Settings, newest: TrainingRun | None) -> Part:
    told = f"nights: {settings.night_cron} {settings.time_zone}"
    if newest is None:
        return Part("Training", "idle", "no run yet", told, "/operate/learning#runs")
    path = f"/operate/runs/{newest.id}"
    if newest.status != "running":
        health: Health = "trouble" if newest.status == "failed" else "good"
        return Part("Training", health, ENDED[newest.status], told, path)
    if not runs.is_training(session):
        return Part("Training", "trouble", "run stopped", "the next run goes on with it", path)
    done = f"{newest.phase} {newest.phase_done} of {newest.phase_total}"
    left = "" if newest.seconds_left is None else f"about {newest.seconds_left / 60.0:.0f} min left"
    return Part("Training", "busy", done, left, path)


def _gate(judged: TrainingRun | None) -> Part:
    if judged is None:
        return Part("Gate", "idle", "nothing judged yet", "", "/operate/releases")
    gates = (judged.result or {})["gates"]
    passed = sum(gate["verdict"] == "pass" for gate in gates)
    health: Health = "good" if passed == len(gates) else "idle"
    held = next((gate["gate"] for gate in gates if gate["verdict"] != "pass"), None)
    told = f"{judged.release}" + (f" held by {held.replace('_', ' ')}" if held else " passed")
    return Part("Gate", health, f"{passed} of {len(gates)} passed", told, f"/operate/releases/{judged.release}")


def _canary(session: Session, now: Now) -> Part:
    rollout = now.rollout
    if rollout is not None and now.challenger:
        votes = {arm: f"{tally.good}/{tally.votes}" for arm, tally in rollout.tallies.items()}
        told = f"{now.challenger}: {votes['challenger']} good votes against {votes['champion']}"
        health: Health = "trouble" if rollout.is_held else "busy"
        return Part("Canary", health, f"{now.share:.0%} of people", told, "/operate/rollout")
    last = canary.newest(session, 1)
    told = f"last: {last[0].challenger}, {last[0].decision}" if last else "none yet"
    return Part("Canary", "idle", "none open", told, "/operate/rollout")


def _champion(now: Now) -> Part:
    up = sum(is_up for _, is_up in now.replicas)
    well = sum(is_up and replica.problem is None for replica, is_up in now.replicas)
    health: Health = "good" if up and well == len(now.replicas) else "trouble"
    told = f"{up} of {len(now.replicas)} engines up"
    return Part("Champion", health, now.champion, told, f"/operate/releases/{now.champion}")


def _time(session: Session) -> datetime:
    time: datetime = session.execute(sa.select(sa.func.now())).scalar_one()
    return time


# -- what waits for somebody ------------------------------------------------------------------------


def decisions(session: Session, now: Now) -> list[Decision]:
    """Return what waits for an operator, the most pressing first."""
    return [
        *_broken(now),
        *_proposed(session),
        *_held(now),
        *_bursts(session),
    ]


def _broken(now: Now) -> Iterator[Decision]:
    for replica, is_up in now.replicas:
        if not is_up or replica.problem:
            away = "nobody has looked at it lately" if replica.is_up else "it does not answer"
            told = replica.problem or f"{away}; `everloop status` shows the parts"
            yield Decision(f"Engine {replica.url} is not well", told, f"/operate/releases/{now.champion}")
    newest = now.newest_run
    if newest is not None and newest.status == "failed":
        told = str((newest.result or {}).get("reason", "its log says why"))
        yield Decision("The last run failed", told, f"/operate/runs/{newest.id}")
    if dead := now.log.dead_letters:
        told = "`everloop log dead list` shows them; retry or drop each"
        title = f"{_plural(sum(dead.values()), 'event was', 'events were')} given up"
        yield Decision(title, told, "/operate/learning#log")


def _proposed(session: Session) -> Iterator[Decision]:
    for proposal in autonomy.open_proposals(session):
        verb = {"canary": "Let people meet", "promote": "Promote"}[proposal.action]
        yield Decision(
            f"{verb} {proposal.release}?",
            proposal.reason,
            f"/operate/releases/{proposal.release}",
            proposal_id=proposal.id,
            release=proposal.release,
            action=proposal.action,
        )


def _held(now: Now) -> Iterator[Decision]:
    if now.rollout is not None and now.rollout.is_held:
        told = "an operator holds it; nothing is decided by itself until it is resumed"
        yield Decision("The canary is held", told, "/operate/rollout")


def _bursts(session: Session) -> Iterator[Decision]:
    for burst in report.list_quarantines(session):
        told = f"{burst['votes']} votes of {burst['raters']} fresh accounts are held; release or discard them"
        yield Decision("A burst of votes is in quarantine", told, "/operate/feedback#quarantines")
