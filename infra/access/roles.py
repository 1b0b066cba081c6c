"""Roles, each of which may do all that the ones before may; and whoever asks, once it is known who they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from infra.errors import ForbiddenError

ANONYMOUS = "anonymous"


class Role(StrEnum):
    """What somebody may do.

    ``user`` chats and rates; ``rater`` also judges answers of others; ``operator`` also decides what is served,
    and sees what people said; ``admin`` also decides who may do what.
    """

    USER = "user"
    RATER = "rater"
    OPERATOR = "operator"
    ADMIN = "admin"

    def reaches(self, needed: Role) -> bool:
        """Tell whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


def lesser(one: Role, other: Role) -> Role:
    """Return the role of the two that may do less."""
    return one if other.reaches(one) else other


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever asks.

    Attributes
    ----------
    name
        For the audit log.
    user
        Who they are to the log of answers and signals; None for whoever only ever speaks for others.
    acts_for_others
        Whether they may name any user: a server of somebody's that has accounts of its own.
    account_id, key_id, session_digest
        What they showed; all None where access is open.
    requests_per_minute
        What the key itself is limited to; None where it sets no limit.
    """

    name: str
    role: Role
    user: str | None = None
    acts_for_others: bool = False
    account_id: str | None = None
    key_id: str | None = None
    session_digest: bytes | None = None
    requests_per_minute: int | None = None

    def speaks_for(self, named: str | None) -> str | None:
        """Return the user that a request is about, which names one or none.

        Raises
        ------
        ForbiddenError
            Code ``not_you`` for the name of somebody else.
        """
        if self.acts_for_others:
            return named
        if named in (None, ANONYMOUS, self.user):
            return self.user
        raise ForbiddenError(
            "You can only speak for yourself: leave out the user, or use a key that may act for others.",
            code="not_you",
            param="user",
        )


EVERYBODY = Caller("operator", Role.ADMIN, acts_for_others=True)
"""Whoever reaches the port, where access is open."""
