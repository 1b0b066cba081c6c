"""Users: who they are to the log, and whether they may be learned from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import User
from infra import sealing
from infra.access import accounts
from infra.errors import ConflictError, EverloopError, InvalidRequestError, UnavailableError
from infra.sealing import SubjectKey
from infra.tables import SubjectKeyRow

TOMBSTONE = "forgotten_"
MEET_TRIES = 3
IN_FLUX = "user_in_flux"


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


def keys_of(session: Session, user_ids: Iterable[str], *, wait: bool = True) -> dict[str, SubjectKey]:
    """Return the keys of those users who exist; see :func:`key_of`.

    Parameters
    ----------
    wait
        Whether to wait for who is being forgotten now; otherwise they are left out.
    """
    return {user_id: key for user_id, key, _ in _locked(session, user_ids, wait)}


def _locked(session: Session, user_ids: Iterable[str], wait: bool) -> list[tuple[str, SubjectKey, bool | None]]:
    """Return who exists of some users, with their keys and what they said, and keep them until the transaction
    ends.

    In the order of names, so that two who wait for each other's rows cannot be.
    """
    rows = session.execute(
        sa.select(User.user_id, User.key_id, SubjectKeyRow.key, User.learn)
        .join(SubjectKeyRow, SubjectKeyRow.key_id == User.key_id)
        .where(User.user_id.in_(sorted(set(user_ids))), SubjectKeyRow.key.is_not(None))
        .order_by(User.user_id)
        .with_for_update(of=User, key_share=True, read=True, skip_locked=not wait)
    )
    return [(user_id, SubjectKey(key_id, key), learn) for user_id, key_id, key, learn in rows if key is not None]


def forgotten() -> ConflictError:
    """Return the error of whoever still speaks as somebody who was forgotten."""
    return ConflictError("Who this was is forgotten; load the page again to go on as somebody new.", code="not_you")


@dataclass(frozen=True, slots=True)
class Met:
    """A user's key, and what they said about being learned from (None: nothing)."""

    key: SubjectKey
    learn: bool | None


def meet_many(session: Session, user_ids: Iterable[str], *, wait: bool = True) -> dict[str, Met | EverloopError]:
    """Return users, who exist from now on and are not forgotten before this transaction ends.

    Of one who cannot be met the error stands there: ``user_reserved``, or ``user_in_flux`` where the user is being
    forgotten just now, again and again if it was to `wait`.
    """
    found: dict[str, Met | EverloopError] = {}
    wanted = set()
    for user_id in set(user_ids):
        try:
            refuse_tombstone(user_id)
            wanted.add(user_id)
        except InvalidRequestError as error:
            found[user_id] = error
    for _ in range(MEET_TRIES):
        found |= {user_id: Met(key, learn) for user_id, key, learn in _locked(session, wanted - found.keys(), wait)}
        if not (missing := wanted - found.keys()):
            return found
        for user_id in accounts.retired(session, missing):
            found[user_id] = forgotten()
        # Who is being forgotten now is gone when the lock is had: they begin anew.
        ensure(session, missing - found.keys())
        if wanted <= found.keys():
            return found
    found |= {user_id: Met(key, learn) for user_id, key, learn in _locked(session, wanted - found.keys(), wait)}
    return {**{user_id: in_flux() for user_id in wanted}, **found}


def in_flux() -> UnavailableError:
    """Return the error of who speaks while they are being forgotten."""
    return UnavailableError("This user is being forgotten just now; try again in a moment.", code=IN_FLUX)


def meet(session: Session, user_id: str) -> SubjectKey:
    """Return the key of one user; see :func:`meet_many`.

    Raises
    ------
    InvalidRequestError, UnavailableError
        Codes ``user_reserved`` and ``user_in_flux``.
    """
    met = meet_many(session, [user_id])[user_id]
    if isinstance(met, EverloopError):
        raise met
    return met.key


def may_learn(session: Session, user_id: str, default: bool) -> bool:
    """Tell whether a user's next message may be learned from: as they said, or else as the operator set."""
    said = session.scalar(sa.select(User.learn).where(User.user_id == user_id))
    return default if said is None else said


def is_known(session: Session, user_id: str) -> bool:
    """Tell whether a user has ever said anything."""
    return session.scalar(sa.select(User.user_id).where(User.user_id == user_id)) is not None


def set_consent(session: Session, user_id: str, learn: bool) -> None:
    """Note what a user said about being learned from; it holds from their next message on."""
    meet(session, user_id)
    session.execute(sa.update(User).where(User.user_id == user_id).values(learn=learn))
