"""Releases that differ from another in how they answer, not in what they learned: its weights, decoded otherwise.

A variant goes through canary, promotion and rollback under a name of its own. Replicas hold and prove the release
whose weights it has, and answer for both.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit, registry
from deploy.names import check_name
from deploy.tables import Proposal, Release
from infra.errors import ConflictError, InvalidRequestError

MAX_BEST_OF = 8


def propose(
    session: Session, of: str, best_of: int, *, name: str | None = None, actor: str, reason: str
) -> Release:
    """Make a release that answers with the best of several answers of another, and propose a canary of it.

    Parameters
    ----------
    of
        The release whose weights it has; of a variant, those that this has.
    name
        What it is called; made of the other's name, if unset.

    Raises
    ------
    NotFoundError
        Code ``release_not_found``.
    IntegrityError
        Code ``adapter_deleted``.
    InvalidRequestError
        Codes ``best_of_invalid``, ``name_protected`` and ``name_invalid``.
    ConflictError
        Code ``name_taken``, or ``variant_known`` where there is one that answers just so.
    """
    if not 2 <= best_of <= MAX_BEST_OF:
        raise InvalidRequestError(
            f"The best of {best_of} cannot be given: choose among 2 to {MAX_BEST_OF}.",
            code="best_of_invalid",
            param="best_of",
        )
    registry.lock_out_erasures(session)
    registry.lock_head(session)  # its files stay while they are looked at
    weights = registry.get_release(session, weights_of(session, registry.get_release(session, of).name))
    registry.check_kept(session, weights.name)
    decoding = {"best_of": best_of}
    same = sa.select(Release.name).where(Release.variant_of == weights.name, Release.decoding == decoding)
    if known := session.scalar(same):
        raise ConflictError(f"{known} answers so already.", code="variant_known")
    if name is not None:
        check_name(name)
    named = name or f"{weights.name}-best{best_of}"
    if session.scalar(sa.select(sa.exists().where(Release.name == named))):
        raise ConflictError(f"There is a release {named!r} already.", code="name_taken", param="name")
    release = Release(name=named, adapter_digest=weights.adapter_digest, decoding=decoding, variant_of=weights.name)
    session.add(release)
    session.flush()
    session.add(Proposal(action="canary", release=named, reason=reason))
    audit.write(
        session, actor=actor, action="variant_made", subject=named, reason=reason, of=weights.name, **decoding
    )
    return release


def weights_of(session: Session, release: str) -> str:
    """Return the release that replicas hold for a release: itself, unless it is a variant."""
    return session.scalar(sa.select(Release.variant_of).where(Release.name == release)) or release


def all_variants(session: Session) -> dict[str, str]:
    """Return every variant with the release whose weights it has."""
    rows = session.execute(sa.select(Release.name, Release.variant_of).where(Release.variant_of.is_not(None)))
    return {name: str(of) for name, of in rows}
