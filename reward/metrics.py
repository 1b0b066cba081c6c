"""What the reward model tells: how much it has learned, how well it foretells, whether people change."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator, Sequence
from typing import ClassVar

import sqlalchemy as sa
from prometheus_client import Counter
from sqlalchemy.orm import Session

from infra.events import Event, SignalSetAside
from infra.telemetry.exposition import DatabaseCollector, Sample
from reward import report, state
from reward.tables import RewardRater

SET_ASIDE = Counter("everloop_reward_signals_set_aside", "Signals that were not learned from.", ["reason"])


def note_set_aside(session: Session, reports: Sequence[Event]) -> None:
    """Count signals that are set aside, once it is committed that they are."""
    reasons = Count(event.reason for event in reports if isinstance(event, SignalSetAside))

    def count(_: object) -> None:
        for reason, number in reasons.items():
            SET_ASIDE.labels(reason).inc(number)

    if reasons:
        sa.event.listen(session, "after_commit", count, once=True)


class RewardCollector(DatabaseCollector):
    """The state of the encoder that learned last."""

    up = "everloop_reward_database_up"
    figures: ClassVar = {
        "everloop_reward_database_up": ("Whether the database answered.",),
        "everloop_reward_updates_total": ("Updates of the posterior that were committed.",),
        "everloop_reward_updated_timestamp_seconds": ("When the reward model learned last.",),
        "everloop_reward_signals_foretold_total": ("Signals that were foretold before they were learned.",),
        "everloop_reward_log_loss_nats_total": (
            "Log losses of those forecasts, summed; a rate of it over that of the signals is the prequential loss.",
        ),
        "everloop_reward_calibration_error": ("Expected calibration error of P(good), 0 to 1.",),
        "everloop_reward_window_log_loss_nats": ("Mean log loss in the window in which nothing has changed.",),
        "everloop_reward_window_signals": ("Signals in that window.",),
        "everloop_reward_drifts_total": ("How often it was seen that people, or answers, have changed.",),
        "everloop_reward_inflation": ("How much wider the posterior was made by that; 1 where never.",),
        "everloop_reward_raters_set_aside": ("Raters who do not count.",),
        "everloop_reward_quarantines": ("Bursts of votes that wait for an operator.",),
    }

    def read(self, session: Session) -> Iterator[Sample]:
        newest = report.newest_state(session)
        if newest is None:
            return
        guards = state.read_guards(session, newest.encoder)
        calibration, window = guards.calibration, guards.drift.buckets
        num_window = sum(bucket.count for bucket in window)
        held = sa.select(sa.func.count()).select_from(RewardRater).where(RewardRater.set_aside)
        found = {
            "updates_total": newest.update_seq,
            "updated_timestamp_seconds": newest.updated_at.timestamp(),
            "signals_foretold_total": calibration.num_seen,
            "log_loss_nats_total": calibration.used_loss,
            "calibration_error": calibration.used.ece,
            "window_log_loss_nats": sum(b.total for b in window) / num_window if num_window else None,
            "window_signals": num_window,
            "drifts_total": guards.drift.num_drifts,
            "inflation": guards.inflation,
            "raters_set_aside": session.scalar(held) or 0,
            "quarantines": len(report.list_quarantines(session)),
        }
        for name, value in found.items():
            if value is not None:
                yield f"everloop_reward_{name}", {}, float(value)
