"""``/v1/deployment``: what is served to whom now, and moving it; canaries; proposals; the audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field

from deploy import audit, autonomy, canary, explanation, head, loop
from deploy.followers import Followers
from deploy.promotion import Operator
from feedback.addresses import client_address
from infra.access.gate import SignedIn, needs
from infra.access.roles import Role
from infra.db import transaction
from infra.text import CleanText

STATIC_DIR = Path(__file__).parent / "static"
router = APIRouter(prefix="/v1", tags=["deployment"], dependencies=[needs(Role.OPERATOR)])
CanaryId = Annotated[int, PathParameter(ge=1, le=2**31 - 1)]
ProposalId = Annotated[int, PathParameter(ge=1, le=2**31 - 1)]
Level = Literal["observe", "propose", "canary", "auto"]


class Reasoned(BaseModel):
    """Why something is done."""

    model_config = ConfigDict(extra="forbid")

    reason: CleanText = Field(min_length=1, max_length=500)


class ReleaseRequest(Reasoned):
    """Which release, and why."""

    release: CleanText


class RollbackRequest(Reasoned):
    """Where to go back to, and why."""

    to: CleanText | None = Field(None, description="A release; the champion before, if unset.")


class CanaryRequest(ReleaseRequest):
    """Which release is to meet users, and why."""

    share: float | None = Field(None, gt=0, lt=1, description="The only step; the settings' if unset.")


class AutonomyRequest(Reasoned):
    """What the platform may do by itself, and why."""

    level: Level


class DeploymentView(BaseModel):
    """The head, and the evidence of the open canary."""

    version: int
    champion: str
    challenger: str | None
    share: float
    autonomy: Level
    rolls_back_to: str | None = Field(description="Where a rollback goes if it names nothing.")
    canary_id: int | None
    evidence: dict[str, Any] | None
    sentence: str | None


class LoopView(BaseModel):
    """Each part of the loop with its figure and its health, and what waits for an operator."""

    model_config = ConfigDict(from_attributes=True)

    parts: list[loop.Part]
    decisions: list[loop.Decision]


class Moved(BaseModel):
    """A champion and the one before."""

    before: str
    champion: str


class ProposalView(BaseModel):
    """Something that the platform would do, and may not."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    action: str
    release: str
    reason: str


def operator(request: Request, caller: SignedIn) -> Operator:
    """Return who asks."""
    state = request.app.state
    return Operator(state.sessions, state.settings, caller.name, client_address(request))


ByOperator = Annotated[Operator, Depends(operator)]


@router.get("/deployment")
def get_deployment(request: Request) -> DeploymentView:
    """Return the deployment head."""
    followers: Followers = request.app.state.canary_followers
    with followers.lock, transaction(request.app.state.sessions) as session:
        current = head.read(session)
        rollout = followers.open_rollout(session)
        return DeploymentView(
            version=current.version,
            champion=current.champion,
            challenger=current.challenger,
            share=current.share,
            autonomy=autonomy.level(session, request.app.state.settings),
            rolls_back_to=loop.rolls_back_to(session),
            canary_id=current.canary_id,
            evidence=rollout.evidence() if rollout else None,
            sentence=rollout.sentence() if rollout else None,
        )


@router.get("/loop")
def get_loop(request: Request) -> LoopView:
    """Return the loop as it is now, from what people say to what they are served."""
    state = request.app.state
    followers: Followers = state.canary_followers
    with followers.lock, transaction(state.sessions) as session:
        now = loop.read(session, followers.open_rollout(session))
        return LoopView(parts=loop.parts(session, state.settings, now), decisions=loop.decisions(session, now))


@router.post("/deployment/promote")
def promote(body: ReleaseRequest, who: ByOperator) -> Moved:
    """Make a release the champion; an open canary ends with it."""
    before, champion = who.promote(body.release, body.reason)
    return Moved(before=before, champion=champion)


@router.post("/deployment/rollback")
def roll_back(body: RollbackRequest, who: ByOperator) -> Moved:
    """Go back to an earlier release."""
    before, champion = who.roll_back(body.to, body.reason)
    return Moved(before=before, champion=champion)


@router.put("/deployment/autonomy")
def set_autonomy(body: AutonomyRequest, who: ByOperator, request: Request) -> DeploymentView:
    """Set what the platform may do by itself."""
    with who.acting() as session:
        autonomy.set_level(session, who.settings, body.level, actor=who.name, reason=body.reason)
    return get_deployment(request)


@router.get("/canaries")
def list_canaries(request: Request, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> list[dict[str, Any]]:
    """Return canaries, the newest first."""
    with transaction(request.app.state.sessions) as session:
        return [explanation.summary(found) for found in canary.newest(session, limit)]


@router.post("/canaries", status_code=201)
def open_canary(body: CanaryRequest, who: ByOperator) -> dict[str, Any]:
    """Let a release meet some users."""
    return explanation.summary(who.try_out(body.release, body.reason, body.share))


@router.get("/canaries/{canary_id}")
def get_canary(canary_id: CanaryId, request: Request) -> dict[str, Any]:
    """Compute a canary again from its log; return the table that led to its decision."""
    with transaction(request.app.state.sessions) as session:
        return explanation.explain(session, canary.get(session, canary_id))


@router.post("/canaries/{canary_id}/{act}")
def act_on_canary(
    canary_id: CanaryId, act: Literal["hold", "resume", "abort"], body: Reasoned, who: ByOperator
) -> dict[str, Any]:
    """Stop automatic decisions about an open canary, let them go on, or end it."""
    with who.acting() as session:
        if act == "abort":
            canary.abort(session, canary_id, actor=who.name, reason=body.reason)
        else:
            canary.hold(session, canary_id, act, actor=who.name, reason=body.reason)
        return explanation.summary(canary.get(session, canary_id))


@router.get("/proposals")
def list_proposals(request: Request) -> list[ProposalView]:
    """Return what waits for an operator, the oldest first."""
    with transaction(request.app.state.sessions) as session:
        return [ProposalView.model_validate(proposal) for proposal in autonomy.open_proposals(session)]


@router.post("/proposals/{proposal_id}/decline", status_code=204)
def decline_proposal(proposal_id: ProposalId, body: Reasoned, who: ByOperator) -> None:
    """Close a proposal without doing what it says."""
    with who.acting() as session:
        autonomy.decline(session, proposal_id, actor=who.name, reason=body.reason)


@router.get("/audit/verification")
def verify_audit(request: Request) -> audit.Verified:
    """Compute every hash of the audit log anew; a row that was changed or is missing is a 409 that names it."""
    with transaction(request.app.state.sessions) as session:
        return audit.verify(session)


@router.get("/audit")
def list_audit(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before_id: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
    automatic: bool | None = None,
) -> list[dict[str, Any]]:
    """Return entries of the audit log, the newest first; `automatic` for what the platform did by itself."""
    with transaction(request.app.state.sessions) as session:
        found = audit.newest(session, limit, before_id=before_id, automatic=automatic)
        return [audit.as_dict(entry) for entry in found]
