"""The head of the deployment: who is served what. Moved by compare-and-swap only.

Each move writes an audit row and an event in the same transaction. Gateways read the head for each
request, so all of them follow at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy import audit
from deploy.registry import check_kept, get_release, is_quarantined, lock_head
from deploy.rollout import Plan
from deploy.tables import AuditEntry, Canary, CanaryUser, Head, Proposal, Release
from infra.errors import ConflictError, InvalidRequestError, NotFoundError
from infra.events import DeploymentChanged
from infra.log import outbox

HEAD_ID = 1
champion_before = AuditEntry.details["before"]["champion"].astext
champion_after = AuditEntry.details["after"]["champion"].astext
PROMOTIONS = ("promoted", "promoted_by_hand")
CANARY_ACTIONS = {"promote": "promoted", "rollback": "canary_rolled_back", "quarantined": "quarantined"}


@dataclass(frozen=True, slots=True)
class Assignment:
    """The release that a user gets, and how it came to that.

    ``best_of`` is how many answers it chooses from, where the release says so (its decoding).
    """

    release: str
    adapter_digest: str | None
    arm: str
    propensity: float
    canary_id: int | None
    best_of: int | None = None


def read(session: Session) -> Head:
    """Return the head as it is now."""
    return session.get_one(Head, HEAD_ID, populate_existing=True)


def unit_interval(canary_id: int, user_id: str) -> float:
    """Place a user in [0, 1) for one canary: sticky within it, independent between canaries."""
    digest = hashlib.sha256(f"{canary_id}:{user_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assignments(session: Session, user_ids: Iterable[str]) -> dict[str, Assignment]:
    """Return the release that each of some users gets under the present head."""
    head = read(session)
    if head.challenger is None or head.canary_id is None:
        champion = _assignment(session, head.champion, "champion", 1.0, None)
        return dict.fromkeys(user_ids, champion)
    canary_id, share = head.canary_id, head.share
    challenger = _assignment(session, head.challenger, "challenger", share, canary_id)
    champion = _assignment(session, head.champion, "champion", 1.0 - share, canary_id)
    return {user_id: challenger if unit_interval(canary_id, user_id) < share else champion for user_id in user_ids}


def pinned(session: Session, name: str) -> Assignment:
    """Return an assignment to a release that the request names."""
    release = get_release(session, name)
    if is_quarantined(session, release.name):
        raise NotFoundError(f"Release {name!r} is quarantined.", code="release_not_found", param="release")
    return _assignment(session, release.name, "pinned", 1.0, None)


def _assignment(session: Session, release: str, arm: str, propensity: float, canary_id: int | None) -> Assignment:
    row = session.execute(
        sa.select(Release.adapter_digest, Release.decoding).where(Release.name == release)
    ).first()
    digest, decoding = row if row is not None else (None, None)
    return Assignment(release, digest, arm, propensity, canary_id, (decoding or {}).get("best_of"))


def open_canary(
    session: Session,
    *,
    challenger: str,
    plan: Plan,
    gates: list[dict[str, object]],
    actor: str,
    reason: str,
) -> Canary:
    """Let `challenger` meet a share of the users, the first of the plan's.

    Raises
    ------
    ConflictError
        Code ``canary_open`` where another candidate is among users, ``already_champion``.
    IntegrityError
        Code ``adapter_deleted``.
    """
    lock_head(session)
    check_kept(session, challenger)
    head = read(session)
    if head.canary_id is not None:
        raise ConflictError(
            f"Canary {head.canary_id} ({head.challenger}) is open; decide it first.", code="canary_open"
        )
    if challenger == head.champion:
        raise ConflictError(f"{challenger} is the champion already.", code="already_champion")
    canary = Canary(champion=head.champion, challenger=challenger, plan=plan.model_dump(mode="json"), gates=gates)
    session.add(canary)
    session.flush()
    _swap(
        session,
        head,
        "canary_opened",
        actor,
        reason,
        release=challenger,
        challenger=challenger,
        canary=canary,
        share=plan.steps[0],
    )
    return canary


def step_canary(session: Session, canary_id: int, share: float, *, actor: str, reason: str) -> None:
    """Let another share of the users meet the challenger."""
    head = read(session)
    canary = _open(session, head, canary_id)
    _swap(
        session,
        head,
        "canary_stepped",
        actor,
        reason,
        release=canary.challenger,
        challenger=canary.challenger,
        canary=canary,
        share=share,
    )


def close_canary(
    session: Session, canary_id: int, *, decision: str, evidence: dict[str, object], actor: str, reason: str
) -> None:
    """End a canary: ``promote`` makes the challenger champion; anything else keeps the champion.

    Raises
    ------
    ConflictError
        Code ``canary_closed`` where it was decided before.
    """
    head = read(session)
    canary = _open(session, head, canary_id)
    _close(session, canary, decision, reason)
    canary.evidence = evidence
    champion = canary.challenger if decision == "promote" else canary.champion
    action = CANARY_ACTIONS.get(decision, "canary_ended")
    _swap(session, head, action, actor, reason, release=canary.challenger, champion=champion)


def move_champion(session: Session, release: str, *, action: str, actor: str, reason: str) -> None:
    """Make `release` the champion by an operator's decision; an open canary ends with it.

    Raises
    ------
    InvalidRequestError
        Code ``reason_missing``.
    ConflictError
        Codes ``already_champion``, ``head_moved``.
    IntegrityError
        Code ``adapter_deleted``.
    """
    check_reason(reason)
    lock_head(session)
    check_kept(session, release)
    head = read(session)
    release, former = get_release(session, release).name, head.champion
    aborted = None
    if head.canary_id is not None:
        canary = session.get_one(Canary, head.canary_id)
        _close(session, canary, "promote" if canary.challenger == release else "aborted", reason)
        aborted = canary.challenger if canary.decision == "aborted" else None
    elif head.champion == release:
        raise ConflictError(f"{release} is the champion already.", code="already_champion")
    subject = release if action == "promoted_by_hand" else former
    _swap(session, head, action, actor, reason, release=subject, champion=release)
    if aborted is not None and aborted != subject:
        _announce(session, read(session), "canary_ended", aborted, reason)


def moved_by_another() -> ConflictError:
    """Return the error of who comes second."""
    return ConflictError(
        "The deployment was changed by somebody else at the same time; look, then try again.", code="head_moved"
    )


def check_reason(reason: str) -> None:
    """Refuse an act without a reason.

    Raises
    ------
    InvalidRequestError
        Code ``reason_missing``.
    """
    if not reason.strip():
        raise InvalidRequestError("A reason is needed.", code="reason_missing", param="reason")


def _open(session: Session, head: Head, canary_id: int) -> Canary:
    if head.canary_id != canary_id:
        raise ConflictError(f"Canary {canary_id} is no longer open.", code="canary_closed")
    return session.get_one(Canary, canary_id)


def _close(session: Session, canary: Canary, decision: str, reason: str) -> None:
    canary.decision, canary.reason, canary.closed_at = decision, reason, sa.func.now()
    session.execute(sa.delete(CanaryUser).where(CanaryUser.canary_id == canary.id))


def previous_champion(session: Session) -> str:
    """Return the champion that a rollback goes to: the one that the present champion was promoted over.

    A rollback undoes a promotion, and another one the promotion before that: going back twice does not bring back
    what was gone back from.

    Raises
    ------
    ConflictError
        Code ``nothing_to_roll_back``.
    """
    promoted = sa.select(champion_before).where(
        AuditEntry.action.in_(PROMOTIONS), champion_before != champion_after
    )
    name = read(session).champion
    seen = {name}
    while True:
        name = (
            session.scalar(promoted.where(champion_after == name).order_by(AuditEntry.id.desc()).limit(1)) or name
        )
        if name in seen:
            raise ConflictError("There is no earlier champion.", code="nothing_to_roll_back")
        if not is_quarantined(session, name):
            return name
        seen.add(name)


def former_champions(session: Session) -> set[str]:
    """Return the releases that were champion before some change of the head."""
    return set(session.scalars(sa.select(champion_before).where(champion_before.is_not(None)).distinct()))


def check_was_champion(session: Session, release: str) -> None:
    """Refuse to go back to what nobody was ever served as champion.

    Raises
    ------
    ConflictError
        Code ``never_champion``.
    """
    if release not in former_champions(session):
        raise ConflictError(
            f"{release} has never been the champion, so there is no going back to it; promote it instead.",
            code="never_champion",
        )


def _swap(
    session: Session,
    head: Head,
    action: str,
    actor: str,
    reason: str,
    *,
    release: str,
    champion: str | None = None,
    challenger: str | None = None,
    canary: Canary | None = None,
    share: float = 0.0,
) -> None:
    before = {"champion": head.champion, "challenger": head.challenger, "version": head.version}
    after = {
        "version": head.version + 1,
        "champion": champion or head.champion,
        "challenger": challenger,
        "canary_id": canary.id if canary else None,
        "share": share,
    }
    moved = session.execute(sa.update(Head).where(Head.id == HEAD_ID, Head.version == head.version).values(**after))
    if moved.rowcount != 1:  # type: ignore[attr-defined]
        raise moved_by_another()
    # What was proposed for whom this is about, or who comes or goes with it, has been decided by the act.
    concerned = {release, before["challenger"], after["champion"]} - {None}
    session.execute(
        sa.update(Proposal)
        .where(Proposal.release.in_(concerned), Proposal.closed_at.is_(None))
        .values(closed_at=sa.func.now(), outcome=action)
    )
    audit.write(session, actor=actor, action=action, subject=release, reason=reason, before=before, after=after)
    _announce(session, read(session), action, release, reason)


def _announce(session: Session, head: Head, action: str, release: str, reason: str) -> None:
    event = DeploymentChanged(
        action=action,
        head_version=head.version,
        champion=head.champion,
        challenger=head.challenger,
        release=release,
        reason=reason,
    )
    outbox.append(session, event, key="deployment")
