"""The proof after a storm: what clients were promised, held against what the database says became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.fold import Standing, as_standing, fold
from feedback.projection import CONSUMER as RECEIPTS
from feedback.tables import Episode, Feedback, ReceiptRow
from infra.events import RewardUpdated
from infra.tables import ConsumedEvent, DeadLetter, OutboxRow
from reward import CONSUMER as REWARD
from reward import history, store
from reward.learner import Change, Learner
from reward.observations import LEARNED_KINDS, observation
from reward.online import BayesianHead
from reward.signals import answers_of
from reward.tables import RewardUpdate

Faults = dict[str, str]


@dataclass(frozen=True, slots=True)
class Account:
    """What a storm left behind.

    Attributes
    ----------
    lost
        Acknowledged signals that are not there, or that a consumer did not apply: why, by idempotency key.
    counted_twice
        Signals with more than one row, update or report, or whose receipt tells of another update: what was found.
    same_bits
        The recovered posterior is, bit for bit, the one learned anew without a fault in between.
    same_signals
        The signals in the posterior are those that the fold of all feedback says.
    """

    lost: Faults
    counted_twice: Faults
    dead_letters: int
    num_updates: int
    num_standing: int
    same_bits: bool
    same_signals: bool


def account(session: Session, accepted: Mapping[str, str], encoder: str, dim: int) -> Account:
    """Check everything.

    Parameters
    ----------
    accepted
        The clients' own list: the id that was acknowledged, by idempotency key.
    dim
        Number of features.
    """
    rows = session.scalars(sa.select(Feedback)).all()
    updates = session.scalars(sa.select(RewardUpdate).order_by(RewardUpdate.seq)).all()
    signals = {row.id: as_standing(row) for row in rows}
    standing = history.latest(updates)
    learned_kinds = [signal for signal in signals.values() if signal.kind in LEARNED_KINDS]
    expected = {signal.feedback_id for signal in fold(learned_kinds)}
    recovered = store.load_posterior(session, encoder, dim)
    return Account(
        lost=_lost(session, accepted, rows),
        counted_twice=_counted_twice(session, accepted, rows, updates, signals),
        dead_letters=session.scalar(sa.select(sa.func.count()).select_from(DeadLetter)) or 0,
        num_updates=len(updates),
        num_standing=len(expected),
        same_bits=recovered.head.digest() == _undisturbed(session, updates, signals, encoder, dim).digest(),
        same_signals=set(standing) == expected
        and recovered.num_signals == sum(change.action == "add" for change in standing.values()),
    )


def _lost(session: Session, accepted: Mapping[str, str], rows: Sequence[Feedback]) -> Faults:
    present = {row.idempotency_key: row.id for row in rows}
    lost: Faults = {}
    for key, feedback_id in accepted.items():
        if key not in present:
            lost[key] = "not in the database"
        elif present[key] != feedback_id:
            lost[key] = "acknowledged under another id"
    for consumer in (REWARD, RECEIPTS):
        applied = set(
            session.scalars(
                sa.select(ConsumedEvent.event_id).where(
                    ConsumedEvent.consumer == consumer, ~ConsumedEvent.dead_letter
                )
            )
        )
        for key, feedback_id in accepted.items():
            if feedback_id not in applied:
                lost.setdefault(key, f"not applied by {consumer}")
    # Until the reward model's report came back, a receipt says `accepted`.
    told = set(session.scalars(sa.select(ReceiptRow.feedback_id).where(ReceiptRow.status != "accepted")))
    for key, feedback_id in accepted.items():
        if feedback_id not in told:
            lost.setdefault(key, "its receipt does not say what became of it")
    return lost


def _counted_twice(
    session: Session,
    accepted: Mapping[str, str],
    rows: Sequence[Feedback],
    updates: Sequence[RewardUpdate],
    signals: Mapping[str, Standing],
) -> Faults:
    promised = set(accepted.values())
    # A row that nobody was promised is a second one of a promised signal, or made up.
    twice: Faults = {row.id: "a row that was not acknowledged" for row in rows if row.id not in promised}
    for what, counts in (
        ("rows", Counter((row.user_id, row.idempotency_key) for row in rows)),
        ("updates", Counter((update.feedback_id, update.action) for update in updates)),
        ("reports", Counter((feedback_id, "") for feedback_id in _reported(session))),
    ):
        twice |= {" ".join(name): f"{count} {what}" for name, count in counts.items() if count > 1}
    added = {update.feedback_id: update.seq for update in updates if update.action == "add"}
    for receipt in session.scalars(sa.select(ReceiptRow)):
        seq = added.get(receipt.feedback_id)
        signal = signals.get(receipt.feedback_id)
        if seq is not None:
            consistent = receipt.status == "learned" and receipt.update_seq == seq
        else:
            consistent = receipt.status == "set_aside" or (signal is not None and signal.withdrawn)
        if not consistent:
            twice.setdefault(receipt.feedback_id, f"receipt: {receipt.status}, {receipt.update_seq}; update {seq}")
    return twice


def _reported(session: Session) -> list[str]:
    """Return the signals that the reward model reported on, once for each report."""
    values = session.scalars(sa.select(OutboxRow.value).where(OutboxRow.topic == RewardUpdated.topic))
    return [orjson.loads(value)["data"]["feedback_id"] for value in values]


def _undisturbed(
    session: Session,
    updates: Sequence[RewardUpdate],
    signals: Mapping[str, Standing],
    encoder: str,
    dim: int,
) -> BayesianHead:
    """Learn the same signals in the same order from nothing; only the order is taken from the history."""
    answers = {row.id: row for row in session.scalars(sa.select(Episode))}
    learned = {update.feedback_id for update in updates if update.action == "add"}
    about = {feedback_id: answers_of(signals[feedback_id], answers) for feedback_id in learned}
    wanted = {store.digest_of(*answer) for some in about.values() for answer in some}
    features: dict[str, Any] = store.cached_features(session, encoder, wanted)
    learner, changes = Learner(BayesianHead.prior(dim)), dict[str, Change]()
    for update in updates:
        if update.action == "inflate":
            learner.head.inflate(update.precision)
            learner.guards.inflation *= update.precision
        elif update.action == "add":
            phis = [features[store.digest_of(*answer)] for answer in about[update.feedback_id]]
            seen = observation(signals[update.feedback_id], phis)
            assert seen is not None and seen[1] == update.verdict
            site = learner.head.learn_one(*seen, update.weight)
            changes[update.feedback_id] = replace(history.change_of(update), z=seen[0], site=site)
        elif update.precision:  # what was held from the first was never in
            learner.withdraw(changes[update.feedback_id])
    return learner.head
