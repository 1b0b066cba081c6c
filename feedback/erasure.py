"""Erasure: a person asks to be forgotten, and every room erases its part.

This room's part is one transaction: content gone from the tables, the key of the person destroyed (which erases
what the outbox, Kafka and every copy of them hold), a tombstone in the place of the name, and the event on which
the other rooms erase theirs. Each notes what it found in the report.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from feedback import episodes, users
from feedback.tables import Conversation, Episode, Erasure, Feedback, SelfEvaluation, User
from infra import sealing
from infra.access import accounts
from infra.errors import NotFoundError
from infra.events import UserForgotten
from infra.ids import new_id
from infra.log import outbox

# Rooms that report after the event; until the last has, the erasure is not complete.
ROOMS = ("feedback", "reward", "trainer", "deploy")


def forget(session: Session, user_id: str, policy: str) -> str:
    """Erase this room's part within the caller's transaction; return the id of the erasure.

    Parameters
    ----------
    policy
        What becomes of adapters that learned from the person: ``retrain-required`` or ``quarantine``.

    Raises
    ------
    NotFoundError
        Code ``user_not_found``.
    """
    # Whoever writes for this user holds a weaker lock on the row: they end first, or find no user.
    user = session.get(User, user_id, with_for_update=True)
    if user is None or user.forgotten_at is not None:
        raise NotFoundError(f"There is no user {user_id!r}.", code="user_not_found", param="user")
    erasure_id = new_id("er")
    tombstone = new_id(users.TOMBSTONE.rstrip("_"))
    session.execute(
        sa.insert(User).values(user_id=tombstone, key_id=user.key_id, learn=False, forgotten_at=sa.func.now())
    )
    found = _erase_content(session, user_id, tombstone)
    sealing.destroy(session, [user.key_id])
    session.delete(user)
    accounts.renew(session, user_id)
    session.add(Erasure(id=erasure_id, tombstone=tombstone, policy=policy, parts={"feedback": found}))
    session.flush()
    event = UserForgotten(erasure_id=erasure_id, tombstone=tombstone)
    outbox.append(session, event, key=tombstone, event_id=erasure_id)
    return erasure_id


def _erase_content(session: Session, user_id: str, tombstone: str) -> dict[str, Any]:
    own = sa.select(Episode.id).where(Episode.user_id == user_id)
    # Theirs, and what verifiers and judges said of their answers.
    concerned = sa.or_(Feedback.user_id == user_id, Feedback.episode_id.in_(own))
    num_signals = _count(
        session,
        sa.update(Feedback)
        .where(concerned)
        .values(
            text=None,
            address_block=None,
            body_digest="",
            idempotency_key=sa.func.concat("erased ", Feedback.id),
            user_id=sa.case((Feedback.user_id == user_id, tombstone), else_=Feedback.user_id),
        ),
    )
    # Conversations before turns, as everybody locks them.
    theirs = sa.select(Conversation.id).where(Conversation.user_id == user_id).order_by(Conversation.id)
    session.execute(theirs.with_for_update()).all()
    num_self_evaluations = _count(session, sa.delete(SelfEvaluation).where(SelfEvaluation.episode_id.in_(own)))
    num_episodes = _count(
        session,
        sa.update(Episode)
        .where(Episode.user_id == user_id)
        .values(user_id=tombstone, sampling=sa.literal({}, JSONB), **episodes.blanked()),
    )
    num_conversations = _count(session, sa.delete(Conversation).where(Conversation.user_id == user_id))
    return {
        "conversations": num_conversations,
        "episodes": num_episodes,
        "signals": num_signals,
        "self_evaluations": num_self_evaluations,
        "keys_destroyed": 1,
    }


def _count(session: Session, statement: sa.Update | sa.Delete) -> int:
    result = session.execute(statement.execution_options(synchronize_session=False))
    return int(result.rowcount)  # type: ignore[attr-defined]


def concerned(session: Session, tombstone: str) -> tuple[list[str], list[str]]:
    """Return the ids of a forgotten user's episodes, and of all signals about them or by them."""
    episode_ids = list(session.scalars(sa.select(Episode.id).where(Episode.user_id == tombstone)))
    signal_ids = list(
        session.scalars(
            sa.select(Feedback.id).where(
                sa.or_(Feedback.user_id == tombstone, Feedback.episode_id.in_(episode_ids))
            )
        )
    )
    return episode_ids, signal_ids


def report(session: Session, erasure_id: str, room: str, found: dict[str, Any]) -> None:
    """Note what a room found and did, within the caller's transaction."""
    session.execute(
        sa.update(Erasure)
        .where(Erasure.id == erasure_id)
        .values(parts=Erasure.parts.op("||")(sa.literal({room: found}, JSONB)))
    )


def send_again(session: Session, older_than: timedelta) -> list[dict[str, Any]]:
    """Have every room erase again what one of them has not reported in time; return the reports so far.

    The event goes out anew, under an id of its own: whoever gave up the first takes this one, and whoever has done
    its part finds nothing left to do.
    """
    is_done = sa.and_(*(Erasure.parts.has_key(room) for room in ROOMS))
    late = sa.select(Erasure).where(~is_done, Erasure.requested_at < sa.func.now() - older_than)
    found = list(session.scalars(late.order_by(Erasure.requested_at).with_for_update()))
    for row in found:
        outbox.append(session, UserForgotten(erasure_id=row.id, tombstone=row.tombstone), key=row.tombstone)
    return [get(session, row.id) for row in found]


def all_erasures(session: Session) -> list[dict[str, Any]]:
    """Return every erasure with the id of the key that it destroyed, by which a restored backup knows the person.

    The id says nothing about them; once they are forgotten there, too, nothing is left of them.
    """
    rows = session.execute(
        sa.select(Erasure, User.key_id)
        .join(User, User.user_id == Erasure.tombstone)
        .order_by(Erasure.requested_at, Erasure.id)
    )
    return [
        {
            "erasure_id": row.id,
            "requested_at": row.requested_at.isoformat(),
            "policy": row.policy,
            "key_id": key_id,
            "complete": all(room in row.parts for room in ROOMS),
        }
        for row, key_id in rows
    ]


def get(session: Session, erasure_id: str) -> dict[str, Any]:
    """Return the report of an erasure.

    Raises
    ------
    NotFoundError
        Code ``erasure_not_found``.
    """
    erasure = session.get(Erasure, erasure_id, populate_existing=True)
    if erasure is None:
        raise NotFoundError(f"There is no erasure {erasure_id!r}.", code="erasure_not_found", param="erasure_id")
    pending = [room for room in ROOMS if room not in erasure.parts]
    return {
        "erasure_id": erasure.id,
        "requested_at": erasure.requested_at.isoformat(),
        "policy": erasure.policy,
        "complete": not pending,
        "pending": pending,
        "found": erasure.parts,
    }
