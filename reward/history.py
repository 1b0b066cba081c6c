"""The history of the posterior in the database: what was done with each signal, and how it is found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.signals import MACHINE_KINDS
from feedback.tables import Feedback, User
from infra.db import ManyRows, among
from infra.errors import IntegrityError
from reward.learner import Change
from reward.online import BayesianHead, Site
from reward.raters import PROGRAM
from reward.tables import RewardUpdate


@dataclass(slots=True)
class Posterior:
    """A head, and the last update that it contains."""

    head: BayesianHead
    update_seq: int
    num_signals: int

    def replay(self, update: RewardUpdate) -> None:
        """Apply one recorded update.

        Raises
        ------
        IntegrityError
            Code ``reward_position_backwards`` for one that is not newer than all before it.
        """
        if update.seq <= self.update_seq:
            raise IntegrityError(
                f"Update {update.seq} comes after update {self.update_seq}.", code="reward_position_backwards"
            )
        if update.action == "inflate":
            self.head.inflate(update.precision)
        elif update.action == "add":
            self.head.apply(site_of(update))
            self.num_signals += 1
        elif update.precision:
            self.head.unlearn_one(site_of(update))
            self.num_signals -= 1
        self.update_seq = update.seq

    def count(self, change: Change, seq: int) -> None:
        """Note a change that the head has made."""
        self.update_seq = seq
        if change.action == "add":
            self.num_signals += 1
        elif change.action != "inflate" and change.site is not None:
            self.num_signals -= 1


def site_of(update: RewardUpdate) -> Site:
    """Return the site that a recorded update added or removed."""
    return Site(np.frombuffer(update.z, np.float64), update.precision, update.target)


def row_of(change: Change, encoder: str, seq: int) -> dict[str, Any]:
    """Return a change as a row of the history."""
    return {
        "seq": seq,
        "feedback_id": change.feedback_id,
        "action": change.action,
        "encoder": encoder,
        "key": change.key,
        "z": change.z.tobytes(),
        "verdict": change.verdict,
        "weight": change.weight,
        "precision": change.site.precision if change.site else 0.0,
        "target": change.site.target if change.site else 0.0,
        "inflation": change.inflation,
        "p_before": change.p_before,
    }


def change_of(update: RewardUpdate) -> Change:
    """Return a row of the history as a change."""
    site = site_of(update)
    return Change(
        update.action,  # type: ignore[arg-type]
        update.feedback_id,
        update.key,
        site.z,
        update.verdict,
        update.weight,
        site if update.precision else None,
        update.inflation,
        update.p_before,
    )


def latest(updates: Iterable[RewardUpdate]) -> dict[str, Change]:
    """Return the latest change of each signal that is in or held, by signal; `updates` in their order."""
    newest = {update.feedback_id: update for update in updates}
    return {name: change_of(update) for name, update in newest.items() if update.action in ("add", "hold")}


def latest_of(session: Session, encoder: str, feedback_ids: Iterable[str]) -> dict[str, Change]:
    """Return the latest change of each of these signals that is in or held."""
    return latest(
        session.scalars(
            sa.select(RewardUpdate)
            .where(among(RewardUpdate.feedback_id, feedback_ids), RewardUpdate.encoder == encoder)
            .order_by(RewardUpdate.seq)
        )
    )


class DatabaseBook:
    """Finds what a rater said (:class:`reward.learner.Book`).

    Parameters
    ----------
    flush
        Writes the changes that are not in the database yet.
    """

    def __init__(self, session: Session, encoder: str, flush: Callable[[], None]) -> None:
        self.session = session
        self.encoder = encoder
        self.flush = flush

    def of_rater(self, rater: str) -> Sequence[Change]:
        """Return the latest change of each of their signals that is in or held."""
        self.flush()
        return list(latest(self.session.scalars(self._query(rater))).values())

    def _query(self, rater: str) -> sa.Select[RewardUpdate]:
        found = (
            sa.select(RewardUpdate)
            .join(Feedback, Feedback.id == RewardUpdate.feedback_id)
            .where(RewardUpdate.encoder == self.encoder)
            .order_by(RewardUpdate.seq)
        )
        by_program = Feedback.kind.in_(MACHINE_KINDS)
        if rater.startswith(PROGRAM):
            return found.where(by_program, Feedback.user_id == rater.removeprefix(PROGRAM))
        return found.join(User, User.user_id == Feedback.user_id).where(~by_program, User.key_id == rater)


def last_seq(session: Session) -> int:
    """Return the number of the newest update, of any encoder."""
    return session.scalar(sa.select(sa.func.max(RewardUpdate.seq))) or 0


_UPDATES = ManyRows(
    "reward_updates",
    {
        "seq": "bigint",
        "feedback_id": "text",
        "action": "text",
        "encoder": "text",
        "key": "text",
        "z": "bytea",
        "verdict": "float8",
        "weight": "float8",
        "precision": "float8",
        "target": "float8",
        "inflation": "float8",
        "p_before": "float8",
    },
)


def write(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows of :func:`row_of` to the history."""
    _UPDATES.write(session, rows)
