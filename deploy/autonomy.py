"""What the platform may do by itself, and what it would do where it may not.

``observe``: nothing; gates judge, and that is all. ``propose``: it says what it would do, and an operator
decides; what harms people is rolled back. ``canary``: it opens canaries, lets more users in and rolls back, and
proposes promotions. ``auto``: it promotes, too.
"""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from deploy import audit, head
from deploy.tables import Proposal
from infra.errors import InvalidRequestError
from infra.settings import Settings

LEVELS = ("observe", "propose", "canary", "auto")
Act = Literal["propose", "rollback", "canary", "promote"]
# The least level at which the platform does it by itself.
NEEDED: dict[Act, str] = {"propose": "propose", "rollback": "propose", "canary": "canary", "promote": "auto"}


def level(session: Session, settings: Settings) -> str:
    """Return the level of this deployment: the one that an operator set, or the settings'."""
    return head.read(session).autonomy or settings.autonomy


def may(session: Session, settings: Settings, act: Act) -> bool:
    """Tell whether the platform may do something by itself."""
    return LEVELS.index(level(session, settings)) >= LEVELS.index(NEEDED[act])


def set_level(session: Session, settings: Settings, new: str, *, actor: str, reason: str) -> str:
    """Set the level of this deployment; return the one before.

    Raises
    ------
    InvalidRequestError
        Code ``autonomy_unknown`` or ``reason_missing``.
    """
    if new not in LEVELS:
        raise InvalidRequestError(
            f"There is no level {new!r}: it is {', '.join(LEVELS[:-1])} or {LEVELS[-1]}.",
            code="autonomy_unknown",
            param="level",
        )
    head.check_reason(reason)
    before = level(session, settings)
    head.read(session).autonomy = new
    session.flush()
    audit.write(
        session, actor=actor, action="autonomy_set", subject="deployment", reason=reason, before=before, after=new
    )
    return before


def propose(session: Session, settings: Settings, action: str, release: str, *, actor: str, reason: str) -> bool:
    """Note what the platform would do, once; return whether it is news.

    Nothing is noted below the level ``propose``, and nothing again that an operator has declined.
    """
    if not may(session, settings, "propose"):
        return False
    declined = sa.exists().where(
        Proposal.action == action, Proposal.release == release, Proposal.outcome == "declined"
    )
    if session.scalar(sa.select(declined)):
        return False
    row = insert(Proposal).values(action=action, release=release, reason=reason).on_conflict_do_nothing()
    if session.execute(row.returning(Proposal.id)).scalar() is None:
        return False
    audit.write(session, actor=actor, action=f"{action}_proposed", subject=release, reason=reason)
    return True


def open_proposals(session: Session) -> list[Proposal]:
    """Return what waits for an operator, the oldest first."""
    return list(session.scalars(sa.select(Proposal).where(Proposal.closed_at.is_(None)).order_by(Proposal.id)))


def decline(session: Session, proposal_id: int, *, actor: str, reason: str) -> None:
    """Close a proposal without doing what it says."""
    head.check_reason(reason)
    proposal = session.get(Proposal, proposal_id, with_for_update=True)
    if proposal is None or proposal.closed_at is not None:
        raise InvalidRequestError(f"There is no open proposal {proposal_id}.", code="proposal_not_open")
    proposal.closed_at, proposal.outcome = sa.func.now(), "declined"
    session.flush()
    audit.write(
        session,
        actor=actor,
        action="proposal_declined",
        subject=proposal.release,
        reason=reason,
        proposal=proposal.action,
    )
