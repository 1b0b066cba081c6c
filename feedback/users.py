"""Users: who they are to the log, and whether they may be learned from."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import User
from infra import sealing
from infra.errors import InvalidRequestError, UnavailableError
from infra.sealing import SubjectKey
from infra.tables import SubjectKeyRow

TOMBSTONE = "forgotten_"
MEET_TRIES = 3


def refuse_tombstone(user_id: str) -> None:
    """Refuse to speak for a forgotten user.

    Raises
    ------
    InvalidRequestError
        Code ``user_reserved``.
    """
    if user_id.startswith(TOMBSTONE):
        raise InvalidRequestError(
            f"Names that begin with {TOMBSTONE!r} are those of forgotten users; use another.",
            code="user_reserved",
            param="user",
        )


def ensure(session: Session, user_ids: Iterable[str]) -> None:
    """Make sure that the users exist, each with a key of their own.

    Raises
    ------
    InvalidRequestError
        Code ``user_reserved`` for a name that only tombstones bear.
    """
    wanted = set(user_ids)
    for user_id in wanted:
        refuse_tombstone(user_id)
    missing = sorted(wanted.difference(session.scalars(sa.select(User.user_id).where(User.user_id.in_(wanted)))))
    if not missing:
        return
    key_ids = sealing.create_keys(session, len(missing))
    rows = [{"user_id": user, "key_id": key_id} for user, key_id in zip(missing, key_ids, strict=True)]
    # Of two first messages at once one waits here and then finds the other's row; its own key stays unused.
    session.execute(insert(User).on_conflict_do_nothing(), rows)


def key_of(session: Session, user_id: str) -> SubjectKey | None:
    """Return a user's key, and keep the user from being forgotten before this transaction ends."""
    return keys_of(session, [user_id]).get(user_id)


def keys_of(session: Session, user_ids: Iterable[str]) -> dict[str, SubjectKey]:
    """Return the keys of those users who exist; see :func:`key_of`."""
    rows = session.execute(
        sa.select(User.user_id, User.key_id, SubjectKeyRow.key)
        .join(SubjectKeyRow, SubjectKeyRow.key_id == User.key_id)
        .where(User.user_id.in_(set(user_ids)), SubjectKeyRow.key.is_not(None))
        .with_for_update(of=User, key_share=True, read=True)
    )
    return {user_id: SubjectKey(key_id, key) for user_id, key_id, key in rows if key is not None}


def meet(session: Session, user_id: str) -> SubjectKey:
    """Return the key of a user, who exists from now on and is not forgotten before this transaction ends.

    Raises
    ------
    UnavailableError
        Code ``user_in_flux`` where the user is being forgotten again and again just now.
    """
    for _ in range(MEET_TRIES):
        ensure(session, [user_id])
        # Who was being forgotten when `ensure` looked is gone when the lock is had: they begin anew.
        if (key := key_of(session, user_id)) is not None:
            return key
    raise UnavailableError("This user is being forgotten just now; try again in a moment.", code="user_in_flux")


def may_learn(session: Session, user_id: str, default: bool) -> bool:
    """Tell whether a user's next message may be learned from: as they said, or else as the operator set."""
    said = session.scalar(sa.select(User.learn).where(User.user_id == user_id))
    return default if said is None else said


def set_consent(session: Session, user_id: str, learn: bool) -> None:
    """Note what a user said about being learned from; it holds from their next message on."""
    meet(session, user_id)
    session.execute(sa.update(User).where(User.user_id == user_id).values(learn=learn))
