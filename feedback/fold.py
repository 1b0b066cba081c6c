"""Which signals stand: the one rule that SQL, the reward model and the dataset builder share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from feedback.tables import Feedback


@dataclass(frozen=True, slots=True)
class Standing:
    """A signal, as far as the fold and its readers need it."""

    feedback_id: str
    seq: int
    episode_id: str
    user_id: str
    kind: str
    slot: str
    value: int | None = None
    score: float | None = None
    name: str | None = None
    reasons: tuple[str, ...] | None = None
    over: str | None = None
    text: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Signals under one key supersede each other."""
        return self.user_id, self.kind, self.slot

    @property
    def withdrawn(self) -> bool:
        """Whether it takes back what was said before, and says nothing itself."""
        return self.value == 0 or self.reasons == ()


def fold(signals: Iterable[Standing]) -> list[Standing]:
    """Return the signals that stand, in the order in which they were given.

    The latest signal of one rater, kind and slot stands; a withdrawn one stands for nothing. The result does not
    depend on the order or the repetition of the input.
    """
    latest: dict[tuple[str, str, str], Standing] = {}
    for signal in signals:
        if signal.key not in latest or latest[signal.key].seq < signal.seq:
            latest[signal.key] = signal
    return sorted((s for s in latest.values() if not s.withdrawn), key=lambda s: s.seq)


def standing_of(rows: Iterable[Feedback]) -> list[Standing]:
    """Fold feedback rows."""
    return fold(map(as_standing, rows))


def as_standing(row: Feedback) -> Standing:
    """Return a feedback row as the fold sees it."""
    return Standing(
        feedback_id=row.id,
        seq=row.seq,
        episode_id=row.episode_id,
        user_id=row.user_id,
        kind=row.kind,
        slot=row.slot,
        value=row.value,
        score=row.score,
        name=row.name,
        reasons=None if row.reasons is None else tuple(row.reasons),
        over=row.over,
        text=row.text,
    )


def standing_ids() -> sa.Select[str]:
    """Return the fold as a query: the ids of the signals that stand, of all rows.

    A test holds it against :func:`fold`. Narrow it by adding conditions on slots, raters or kinds, never on single
    signals: a signal left out could be the one that supersedes.
    """
    latest = (
        sa.select(Feedback.id, Feedback.value, Feedback.reasons)
        .ext(distinct_on(Feedback.user_id, Feedback.kind, Feedback.slot))
        .order_by(Feedback.user_id, Feedback.kind, Feedback.slot, Feedback.seq.desc())
        .subquery()
    )
    return sa.select(latest.c.id).where(
        sa.func.coalesce(latest.c.value, 1) != 0, sa.func.coalesce(sa.func.cardinality(latest.c.reasons), 1) != 0
    )


def histories(session: Session, slots: Iterable[str]) -> dict[tuple[str, str, str], list[Standing]]:
    """Return all signals in the given slots, by key and in their order."""
    rows = session.scalars(sa.select(Feedback).where(Feedback.slot.in_(set(slots))).order_by(Feedback.seq))
    found: dict[tuple[str, str, str], list[Standing]] = {}
    for row in rows:
        signal = as_standing(row)
        found.setdefault(signal.key, []).append(signal)
    return found
