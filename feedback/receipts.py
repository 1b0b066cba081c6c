"""Receipts: what became of a signal, for the person who gave it.

Read from a projection of the log (:mod:`feedback.projection`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from feedback.fold import as_standing, fold, histories
from feedback.tables import Feedback, ReceiptFate, ReceiptRow, ReceiptRun, ReceiptUse
from infra.errors import NotFoundError

MAX_PAGE = 100


class RewardPart(BaseModel):
    """What the reward model did with the signal."""

    update_seq: int = Field(description="The update of the posterior that used it.")
    p_before: float | None = Field(description="P(good) of the answer before.")
    p_after: float | None = Field(description="P(good) of the answer after.")


class TrainingPart(BaseModel):
    """A run whose dataset holds the signal, and what came of it."""

    run_id: str
    role: str = Field(description="train, or gates: kept to judge with.")
    dataset_digest: str
    reward_snapshot_id: int
    status: str | None = Field(description="How the run ended; null while it runs.")
    release: str | None
    adapter_digest: str | None
    fate: str | None = Field(description="canary, promoted, not_promoted, rolled_back, quarantined or held.")
    reason: str | None


class Receipt(BaseModel):
    """What became of a signal."""

    id: str
    episode_id: str
    kind: str
    given_at: datetime
    status: str = Field(description="accepted, learned, set_aside, superseded or withdrawn.")
    reason: str | None = Field(description="Why it was set aside, or by which signal it was superseded.")
    reward: RewardPart | None
    training: list[TrainingPart]
    summary: str = Field(description="The same in a sentence.")


# -- reading it -----------------------------------------------------------------------------------


def get(session: Session, feedback_id: str, user_id: str) -> Receipt:
    """Return the receipt of a signal.

    Raises
    ------
    NotFoundError
        Code ``feedback_not_found``, for somebody else's signal too.
    """
    row = session.scalars(sa.select(Feedback).where(Feedback.id == feedback_id)).one_or_none()
    if row is None or row.user_id != user_id:
        raise NotFoundError(
            f"There is no signal {feedback_id!r}. Use the `id` that POST /v1/feedback returned.",
            code="feedback_not_found",
            param="feedback_id",
        )
    return of(session, [row])[0]


def page(session: Session, user_id: str, before: str | None, limit: int) -> list[Receipt]:
    """Return a user's receipts, the newest first.

    Parameters
    ----------
    before
        The id of the last receipt of the page before.
    """
    query = sa.select(Feedback).where(Feedback.user_id == user_id)
    if before is not None:
        query = query.where(Feedback.id < before)
    rows = session.scalars(query.order_by(Feedback.id.desc()).limit(min(limit, MAX_PAGE))).all()
    return of(session, rows)


def of(session: Session, rows: Sequence[Feedback]) -> list[Receipt]:
    """Return the receipts of signals, in their order."""
    ids = [row.id for row in rows]
    projected = {
        r.feedback_id: r for r in session.scalars(sa.select(ReceiptRow).where(ReceiptRow.feedback_id.in_(ids)))
    }
    training: dict[str, list[TrainingPart]] = {feedback_id: [] for feedback_id in ids}
    for use, run, fate in session.execute(
        sa.select(ReceiptUse, ReceiptRun, ReceiptFate)
        .outerjoin(ReceiptRun, ReceiptRun.run_id == ReceiptUse.run_id)
        .outerjoin(ReceiptFate, ReceiptFate.release == ReceiptRun.release)
        .where(ReceiptUse.feedback_id.in_(ids))
        .order_by(ReceiptUse.run_id)
    ):
        training[use.feedback_id].append(_training_part(use, run, fate))
    history = histories(session, {row.slot for row in rows})
    newest = {row.id: history[as_standing(row).key][-1].feedback_id for row in rows}
    return [_receipt(row, newest[row.id], projected.get(row.id), training[row.id]) for row in rows]


def _training_part(use: ReceiptUse, run: ReceiptRun | None, fate: ReceiptFate | None) -> TrainingPart:
    return TrainingPart(
        run_id=use.run_id,
        role=use.role,
        dataset_digest=use.dataset_digest,
        reward_snapshot_id=use.reward_snapshot_id,
        status=run and run.status,
        release=run and run.release,
        adapter_digest=run and run.adapter_digest,
        fate=fate.fate if fate else "held" if run and run.status == "held" else None,
        reason=fate.reason if fate else run and run.reason,
    )


def _receipt(row: Feedback, newest: str, projected: ReceiptRow | None, training: list[TrainingPart]) -> Receipt:
    status = projected.status if projected else "accepted"
    reason = projected.reason if projected else None
    reward = None
    if projected is not None and projected.update_seq is not None:
        reward = RewardPart(update_seq=projected.update_seq, p_before=projected.p_before, p_after=projected.p_after)
    if newest != row.id:
        status, reason = "superseded", newest
    elif not fold([as_standing(row)]):
        status, reason = "withdrawn", None
    receipt = Receipt(
        id=row.id,
        episode_id=row.episode_id,
        kind=row.kind,
        given_at=row.given_at or row.created_at,
        status=status,
        reason=reason,
        reward=reward,
        training=training,
        summary="",
    )
    receipt.summary = _sentence(receipt)
    return receipt


def _sentence(receipt: Receipt) -> str:
    """Say a receipt in a sentence."""
    said = "What you did" if receipt.kind == "implicit" else f"Your {receipt.kind}"
    if receipt.status == "superseded":
        return f"{said} was replaced by a later one ({receipt.reason})."
    if receipt.status == "withdrawn":
        return f"{said} withdraws what you said before."
    if receipt.status == "set_aside":
        said += f" was set aside ({receipt.reason})"
    elif receipt.reward is None or receipt.reward.p_after is None:
        said += " was accepted"
    else:
        before = f"from {receipt.reward.p_before:.0%} " if receipt.reward.p_before is not None else ""
        said += f" moved the belief that the answer is good {before}to {receipt.reward.p_after:.0%}"
    trained = [part for part in receipt.training if part.release]
    if not trained:
        return f"{said}; no adapter has been trained with it yet."
    last = next((part for part in reversed(trained) if part.fate == "promoted"), trained[-1])
    act = "helped to train" if last.role == "train" else "helped to judge"
    fate = (last.fate or "registered").replace("_", " ")
    return f"{said}, and {act} {last.release} ({fate})."
