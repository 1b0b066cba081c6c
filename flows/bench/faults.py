"""``everloop bench faults``: a seeded storm of SIGKILLs under load, and the proof that it left no trace.

A kill is over when a signal that was first sent after it has its effect committed by the reward model and by the
receipts: the whole way works again. Some kills come before the one before is over.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from feedback.projection import CONSUMER as RECEIPTS
from flows.bench.proof import Account, account
from flows.bench.raters import Raters, write_pairs
from flows.bench.stack import log_stack
from infra import report
from infra.db import DATABASE_AWAY, Sessions
from infra.errors import EverloopError
from infra.log.outbox import lacked_by_some
from infra.settings import Settings
from infra.stack.supervisor import Supervisor
from infra.tables import ConsumedEvent, OutboxRow
from reward import CONSUMER as REWARD

TARGETS = ("api", "relay", "reward", "ledger", "broker", "postgres")
OVERLAPPING_SHARE = 0.2
PAUSES_S = (0.2, 1.5)
OVERLAPPING_PAUSES_S = (0.05, 0.4)
POLL_S = 0.05
RECOVERY_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 300.0
LOG_LINES = 30


@dataclass(frozen=True, slots=True)
class Plan:
    """A kill to come.

    Attributes
    ----------
    pause_s
        How long to wait before it.
    overlapping
        Whether it comes while the one before is still being recovered from.
    """

    part: str
    pause_s: float
    overlapping: bool


@dataclass(slots=True)
class Kill:
    """A kill that was done, and what its recovery took."""

    part: str
    pid: int
    at_s: float
    recovery_s: float | None = None


def plan(kills: int, seed: int) -> list[Plan]:
    """Return the storm: each part at least once where there are kills enough, in random order."""
    draw = random.Random(seed)
    parts = draw.sample(TARGETS, min(kills, len(TARGETS)))
    parts += draw.choices(TARGETS, k=kills - len(parts))
    draw.shuffle(parts)
    overlapping = set(draw.sample(range(1, kills), round(OVERLAPPING_SHARE * (kills - 1))))
    return [
        Plan(part, draw.uniform(*(OVERLAPPING_PAUSES_S if n in overlapping else PAUSES_S)), n in overlapping)
        for n, part in enumerate(parts)
    ]


def storm(kills: int, seed: int) -> dict[str, Any]:
    """Kill parts under load, wait until everything is applied, and account for every signal.

    Parameters
    ----------
    kills
        How many processes get a SIGKILL.
    seed
        Of the order of the kills, the pauses between them, and what the raters say.
    """
    with log_stack() as (settings, sessions, supervisor):
        report.say("writing episodes")
        raters = Raters(settings, write_pairs(sessions), seed)
        _until_drained(sessions)
        began_s = time.monotonic()
        with raters, _logs_where_stuck(settings):
            done, num_overlapping = Storm(sessions, supervisor, raters).run(plan(kills, seed))
        seconds = time.monotonic() - began_s
        report.say(f"{len(raters.accepted)} signals accepted in {seconds:.0f} s; waiting until they are applied")
        drain_s = _until_drained(sessions)
        accounted = _account(sessions, settings, raters)
    return {
        "kills": len(done),
        "kills_overlapping": num_overlapping,
        "kills_per_part": {part: sum(kill.part == part for kill in done) for part in TARGETS},
        **_recoveries(done),
        "seconds": seconds,
        "drain_s": drain_s,
        "signals_accepted": len(raters.accepted),
        "answers_by_status": dict(sorted(raters.answers.items())),
        "updates": accounted.num_updates,
        "signals_standing": accounted.num_standing,
        "lost": len(set(accounted.lost) | set(raters.changed)),
        "counted_twice": len(accounted.counted_twice),
        "dead_letters": accounted.dead_letters,
        "changed_ids": len(raters.changed),
        "reward_same_bits": accounted.same_bits,
        "reward_same_signals": accounted.same_signals,
        "reward_state_equal": accounted.same_bits and accounted.same_signals,
    }


class Storm:
    """Kills parts, and looks when each kill is over."""

    def __init__(self, sessions: Sessions, supervisor: Supervisor, raters: Raters) -> None:
        self.sessions = sessions
        self.supervisor = supervisor
        self.raters = raters

    def run(self, plans: Sequence[Plan]) -> tuple[list[Kill], int]:
        """Carry the plans out; return the kills, and how many came during a recovery."""
        done: list[Kill] = []
        num_overlapping = 0
        for number, following in enumerate(plans, start=1):
            if not following.overlapping:
                self._recover(done)
            self._watch(done, following.pause_s)
            under_way = any(kill.recovery_s is None for kill in done)
            num_overlapping += under_way
            during = " during a recovery" if under_way else ""
            report.say(f"kill {number} of {len(plans)}: {following.part}{during}")
            done.append(self._kill(following.part))
        self._recover(done)
        return done, num_overlapping

    def _kill(self, part: str) -> Kill:
        deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while (pid := self._pid(part)) is None:  # killed a moment ago, and not started again yet
            _check(deadline_s, f"{part} was not started again")
            time.sleep(POLL_S)
        os.kill(pid, signal.SIGKILL)
        return Kill(part, pid, time.monotonic())

    def _watch(self, done: Sequence[Kill], seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0:
            self._look(done)
            time.sleep(min(POLL_S, left_s))
        self._look(done)

    def _pid(self, part: str) -> int | None:
        return next(status.pid for status in self.supervisor.status() if status.name == part)

    def _recover(self, done: Sequence[Kill]) -> None:
        deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while any(kill.recovery_s is None for kill in done):
            self._look(done)
            self.raters.check()
            _check(deadline_s, "the log did not recover from a kill")
            time.sleep(POLL_S)

    def _look(self, done: Sequence[Kill]) -> None:
        """Note which kills are over."""
        for kill in done:
            if kill.recovery_s is None and self._works(self.raters.begun_after(kill.at_s)):
                over_s = time.monotonic()
                if self._pid(kill.part) not in (None, kill.pid):
                    kill.recovery_s = over_s - kill.at_s
                    report.say(f"  {kill.part} was back after {kill.recovery_s:.1f} s")

    def _works(self, feedback_ids: Sequence[str]) -> bool:
        """Tell whether both consumers applied one of the signals."""
        if not feedback_ids:
            return False
        applied = (
            sa.select(ConsumedEvent.event_id)
            .where(
                ConsumedEvent.event_id.in_(feedback_ids),
                ConsumedEvent.consumer.in_([REWARD, RECEIPTS]),
                ~ConsumedEvent.dead_letter,
            )
            .group_by(ConsumedEvent.event_id)
            .having(sa.func.count() == 2)
        )
        try:
            with self.sessions() as session:
                return session.scalar(applied.limit(1)) is not None
        except DATABASE_AWAY:
            return False


@contextmanager
def _logs_where_stuck(settings: Settings) -> Iterator[None]:
    """Say the last lines of each part's log where the storm gets stuck: the directory goes away with it."""
    try:
        yield
    except EverloopError:
        for path in sorted(settings.log_dir.glob("*.log")):
            report.say(f"the end of {path.name}:")
            for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:]:
                report.say(f"  {line[:300]}")
        raise


def _until_drained(sessions: Sessions) -> float:
    """Wait until everything is published and every consumer has applied it; return the seconds it took."""
    began_s = time.monotonic()
    lacking = sa.select(
        sa.exists().where(sa.or_(OutboxRow.published_at.is_(None), lacked_by_some())).select_from(OutboxRow)
    )
    while True:
        with sessions() as session:
            if not session.scalar(lacking):
                return time.monotonic() - began_s
        _check(began_s + DRAIN_TIMEOUT_S, "the log did not drain")
        time.sleep(POLL_S)


def _check(deadline_s: float, what: str) -> None:
    if time.monotonic() > deadline_s:
        raise EverloopError(f"In time, {what}.", code="bench_stuck")


def _account(sessions: Sessions, settings: Settings, raters: Raters) -> Account:
    from reward.encoder import open_encoder

    encoder = open_encoder(settings)
    accepted = {key: ack.feedback_id for key, ack in raters.accepted.items()}
    with sessions() as session:
        found = account(session, accepted, encoder.name, encoder.dim)
    for name in ("lost", "counted_twice"):
        for signal_name, what in list(getattr(found, name).items())[:20]:
            report.say(f"{name}: {signal_name}: {what}")
    return found


def _recoveries(done: Sequence[Kill]) -> dict[str, float]:
    """Return median and longest recovery of each part, in seconds."""
    result = {}
    for part in TARGETS:
        took_s = [kill.recovery_s for kill in done if kill.part == part and kill.recovery_s is not None]
        if took_s:
            result[f"recovery_{part}_median_s"] = statistics.median(took_s)
            result[f"recovery_{part}_max_s"] = max(took_s)
    return result
