"""Signals as an operator looks for them: who said what about which answer, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from feedback import receipts
from feedback.episodes import get as get_episode
from feedback.receipts import Receipt
from feedback.signals import MACHINE_KINDS
from feedback.tables import Episode, Feedback, ReceiptRow, User
from feedback.users import TOMBSTONE
from infra.errors import UnavailableError
from reward.raters import PROGRAM
from reward.tables import GoldProbe, RewardRater, RewardScore, Ruling

SEARCH_TIMEOUT_MS = 3000
QUERY_CANCELED = "57014"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which signals are wanted; what is empty does not narrow the search.

    Attributes
    ----------
    words
        Words of a comment or correction, in any order.
    status
        ``accepted``, ``learned`` or ``set_aside``.
    before
        Only signals older than the one with this id.
    """

    words: str = ""
    kind: str = ""
    user: str = ""
    status: str = ""
    reason: str = ""
    before: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A signal with the release that it is about and what became of it."""

    signal: Feedback
    release: str
    status: str
    reason: str | None


def search(session: Session, wanted: Wanted, limit: int) -> list[Found]:
    """Return signals, the newest first.

    Raises
    ------
    UnavailableError
        Code ``search_too_wide`` where it would keep the database busy.
    """
    query = (
        sa.select(Feedback, Episode.release, ReceiptRow.status, ReceiptRow.reason)
        .join(Episode, Episode.id == Feedback.episode_id)
        .outerjoin(ReceiptRow, ReceiptRow.feedback_id == Feedback.id)
        .where(*_conditions(wanted), ~Feedback.user_id.startswith(TOMBSTONE, autoescape=True))
        .order_by(Feedback.id.desc())
        .limit(limit)
    )
    session.execute(sa.text(f"SET LOCAL statement_timeout = {SEARCH_TIMEOUT_MS}"))
    try:
        rows = session.execute(query).all()
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != QUERY_CANCELED:
            raise
        raise UnavailableError(
            "That search takes too long. Narrow it: name a user, a kind, or more words.", code="search_too_wide"
        ) from error
    return [Found(signal, release, status or "accepted", reason) for signal, release, status, reason in rows]


def _conditions(wanted: Wanted) -> Sequence[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if wanted.words:
        document = sa.func.to_tsvector(sa.literal_column("'simple'"), Feedback.text)
        asked = sa.func.plainto_tsquery(sa.literal_column("'simple'"), wanted.words)
        found += [Feedback.text.is_not(None), document.bool_op("@@")(asked)]
    if wanted.kind:
        found.append(Feedback.kind == wanted.kind)
    if wanted.user:
        found.append(Feedback.user_id == wanted.user)
    if wanted.status == "accepted":
        found.append(sa.or_(ReceiptRow.status.is_(None), ReceiptRow.status == "accepted"))
    elif wanted.status:
        found.append(ReceiptRow.status == wanted.status)
    if wanted.reason:
        found.append(ReceiptRow.reason == wanted.reason)
    if wanted.before:
        found.append(Feedback.id < wanted.before)
    return found


@dataclass(frozen=True, slots=True)
class InContext:
    """An answer with the conversation before it, all that was said of it, and what operators judged."""

    episode: Episode
    score: RewardScore | None
    signals: list[tuple[Feedback, Receipt]]
    raters: dict[str, RewardRater]
    probes: list[GoldProbe]
    rulings: list[tuple[str, Ruling]]


def in_context(session: Session, episode_id: str) -> InContext:
    """Return an answer as an operator reads it.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    """
    episode = get_episode(session, episode_id)
    about = sa.or_(Feedback.episode_id == episode_id, Feedback.over == episode_id)
    signals = session.scalars(sa.select(Feedback).where(about).order_by(Feedback.seq)).all()
    users = {signal.user_id for signal in signals if signal.kind not in MACHINE_KINDS}
    programs = [PROGRAM + signal.user_id for signal in signals if signal.kind in MACHINE_KINDS]
    keys = sa.select(User.key_id, User.user_id).where(User.user_id.in_(users))
    named = dict(session.execute(keys).tuples().all())
    raters = session.scalars(sa.select(RewardRater).where(RewardRater.name.in_([*named, *programs])))
    probes = session.scalars(sa.select(GoldProbe).where(GoldProbe.episode_id == episode_id).order_by(GoldProbe.id))
    rulings = session.scalars(sa.select(Ruling).where(Ruling.rater.in_([*named, *programs])).order_by(Ruling.id))
    return InContext(
        episode=episode,
        score=session.get(RewardScore, episode_id),
        signals=list(zip(signals, receipts.of(session, signals), strict=True)),
        raters={named.get(rater.name, rater.name): rater for rater in raters},
        probes=list(probes),
        rulings=[(named.get(ruling.rater or "", ruling.rater or ""), ruling) for ruling in rulings],
    )


def counts(session: Session) -> dict[str, list[tuple[Any, ...]]]:
    """Return how many signals there are of each kind, and why how many were set aside."""
    kinds = session.execute(
        sa.select(Feedback.kind, sa.func.count()).group_by(Feedback.kind).order_by(sa.func.count().desc())
    )
    aside = session.execute(
        sa.select(ReceiptRow.reason, sa.func.count())
        .where(ReceiptRow.status == "set_aside")
        .group_by(ReceiptRow.reason)
        .order_by(sa.func.count().desc())
    )
    return {"kinds": [tuple(row) for row in kinds], "set_aside": [tuple(row) for row in aside]}
