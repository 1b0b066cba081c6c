"""``/v1/feedback`` and ``/v1/me``: saying something about an answer, and what became of it."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from feedback import erasure, receipts, users
from feedback.acceptance import Accepted
from feedback.addresses import address_block
from feedback.identity import MAX_CHARS, CurrentUser, NamedUser
from feedback.receipts import Receipt
from feedback.signals import MACHINE_KINDS, Signal
from feedback.tables import User
from infra.access.gate import SignedIn, needs
from infra.access.roles import ANONYMOUS, Caller, Role
from infra.db import transaction
from infra.errors import EverloopError, ForbiddenError
from infra.text import CleanText

MAX_BATCH = 1000

router = APIRouter(prefix="/v1", tags=["feedback"], dependencies=[needs(Role.USER)])

Before = Annotated[CleanText | None, Query(max_length=64, description="Id of the last row of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Rows of a page.")]


class Batch(BaseModel):
    """Many signals at once."""

    model_config = ConfigDict(extra="forbid")

    signals: list[Signal] = Field(min_length=1, max_length=MAX_BATCH)


class BatchItem(BaseModel):
    """What became of one signal of a batch: its acceptance, or the error that refused it."""

    accepted: Accepted | None = None
    error: dict[str, Any] | None = None


class BatchResult(BaseModel):
    """One item per signal, in their order."""

    num_accepted: int
    results: list[BatchItem]


class Consent(BaseModel):
    """Whether the assistant may learn from a user; it holds from the next message on."""

    model_config = ConfigDict(extra="forbid")

    learn: bool


class Me(BaseModel):
    """What Everloop holds about the one who asks."""

    user: str
    learn: bool = Field(description="Whether their next message may be learned from.")
    learn_is_default: bool = Field(description="True where they said nothing, and the operator's default holds.")


class ReceiptPage(BaseModel):
    """Receipts, the newest first; ``next_before`` is null on the last page."""

    data: list[Receipt]
    next_before: str | None


class ErasureReport(BaseModel):
    """What was found where; rooms that have not reported yet are pending."""

    erasure_id: str
    requested_at: str
    policy: str
    complete: bool
    pending: list[str]
    found: dict[str, Any]


@router.post("/feedback", status_code=202)
async def give_feedback(signal: Signal, caller: SignedIn, request: Request) -> Accepted:
    """Say something about an answer. The signal is safe in the log when this answers."""
    _said_by(caller, signal, address_block(request))
    outcome = (await request.app.state.intake.give([signal]))[0]
    if isinstance(outcome, EverloopError):
        raise outcome
    accepted: Accepted = outcome
    return accepted


@router.post("/feedback/batch", status_code=202)
async def give_batch(batch: Batch, caller: SignedIn, request: Request) -> BatchResult:
    """Say many things at once. Signals that cannot be accepted do not hold up the others."""
    block = address_block(request)
    refused = [_refusal(caller, signal, block) for signal in batch.signals]
    taken = [signal for signal, refusal in zip(batch.signals, refused, strict=True) if refusal is None]
    given = iter(await request.app.state.intake.give(taken) if taken else ())
    outcomes = [next(given) if refusal is None else refusal for refusal in refused]
    return BatchResult(
        num_accepted=sum(isinstance(outcome, Accepted) for outcome in outcomes),
        results=[
            BatchItem(accepted=o) if isinstance(o, Accepted) else BatchItem(error=o.envelope()["error"])
            for o in outcomes
        ],
    )


def _said_by(caller: Caller, signal: Signal, block: str | None) -> None:
    """Note who says it, and from where.

    Raises
    ------
    ForbiddenError
        Code ``not_you``, or ``role_needed``: what machines say of anybody's answer, not everybody may send.
    """
    signal.came_from(block)
    if signal.kind not in MACHINE_KINDS:
        signal.user = caller.speaks_for(signal.user) or ANONYMOUS
    elif not caller.acts_for_others:  # nobody's program takes the name, and the verdicts, of another's
        signal.user = f"{caller.name}/{signal.user}"[:MAX_CHARS]
    if signal.kind in MACHINE_KINDS and not caller.role.reaches(Role.RATER):
        raise ForbiddenError(
            f"To send a {signal.kind} signal needs the role rater.", code="role_needed", param="kind"
        )


def _refusal(caller: Caller, signal: Signal, block: str | None) -> EverloopError | None:
    try:
        _said_by(caller, signal, block)
    except ForbiddenError as error:
        return error
    return None


@router.get("/feedback/{feedback_id}/receipt")
def get_receipt(feedback_id: CleanText, user: CurrentUser, request: Request) -> Receipt:
    """Return what became of a signal of yours."""
    with transaction(request.app.state.sessions) as session:
        return receipts.get(session, feedback_id, user)


@router.get("/me/receipts")
def my_receipts(user: CurrentUser, request: Request, before: Before = None, limit: Limit = 20) -> ReceiptPage:
    """List what became of your signals, the newest first."""
    with transaction(request.app.state.sessions) as session:
        found = receipts.page(session, user, before, limit)
    return ReceiptPage(data=found, next_before=found[-1].id if len(found) == limit else None)


@router.get("/me")
def me(user: CurrentUser, request: Request) -> Me:
    """Return what Everloop holds about you."""
    with transaction(request.app.state.sessions) as session:
        return _me(session, user, request)


@router.put("/me/consent")
def consent(wish: Consent, user: NamedUser, request: Request) -> Me:
    """Say whether the assistant may learn from you, from your next message on."""
    with transaction(request.app.state.sessions) as session:
        users.set_consent(session, user, wish.learn)
        return _me(session, user, request)


def _me(session: Any, user: str, request: Request) -> Me:
    said = session.scalar(sa.select(User.learn).where(User.user_id == user))
    default = request.app.state.settings.learn_by_default
    return Me(user=user, learn=default if said is None else said, learn_is_default=said is None)


@router.delete("/me", status_code=202)
def forget_me(user: NamedUser, request: Request) -> ErasureReport:
    """Erase all that you said and all that was learned from it, as far as it can be told apart."""
    with transaction(request.app.state.sessions) as session:
        erasure_id = erasure.forget(session, user, request.app.state.settings.erasure_policy)
        told = ErasureReport.model_validate(erasure.get(session, erasure_id))
    request.app.state.gate.forget()  # whoever it was is somebody else from now on
    return told


@router.get("/erasures/{erasure_id}")
def get_erasure(erasure_id: CleanText, request: Request) -> ErasureReport:
    """Return the report of an erasure; its id is known to the one who asked for it."""
    with transaction(request.app.state.sessions) as session:
        return ErasureReport.model_validate(erasure.get(session, erasure_id))
