"""Signals: accepting them once, and which of them stand."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.tables import Feedback
from infra import outbox
from infra.errors import ConflictError
from infra.events import FeedbackGiven
from infra.text import CleanText

MAX_CORRECTION_CHARS = 16_000


class Signal(BaseModel):
    """What a person says of an answer: a thumb, or the answer as it should have been."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"episode_id": "ep_1f…", "user": "ada", "kind": "thumb", "value": 1, "idempotency_key": "k1"},
                {
                    "episode_id": "ep_1f…",
                    "user": "ada",
                    "kind": "correction",
                    "text": "Paris.",
                    "idempotency_key": "k2",
                },
            ]
        },
    )

    episode_id: CleanText = Field(min_length=1, max_length=64)
    user: CleanText = Field(min_length=1, max_length=128, description="Who says it.")
    kind: Literal["thumb", "correction"]
    value: Literal[-1, 0, 1] | None = Field(None, description="Of a thumb; 0 withdraws it.")
    text: CleanText | None = Field(None, min_length=1, max_length=MAX_CORRECTION_CHARS)
    idempotency_key: CleanText = Field(min_length=1, max_length=128, description="Makes a retry harmless.")

    @model_validator(mode="after")
    def _fits_kind(self) -> Signal:
        if self.kind == "thumb" and (self.value is None or self.text is not None):
            raise ValueError("A thumb has a `value` of -1, 0 or 1, and no `text`.")
        if self.kind == "correction" and (self.text is None or not self.text.strip() or self.value is not None):
            raise ValueError("A correction has a `text`, and no `value`.")
        return self

    def digest(self) -> str:
        """Return the digest that tells a retry from another signal under the same key."""
        return hashlib.sha256(self.model_dump_json(exclude={"idempotency_key"}).encode()).hexdigest()


class Receipt(BaseModel):
    """Proof that a signal was accepted."""

    id: str
    episode_id: str
    kind: str
    status: Literal["accepted"] = "accepted"
    repeated: bool = Field(description="True where this is the answer to a retry.")


def accept(session: Session, signal: Signal) -> Receipt:
    """Write a signal and its event, once per idempotency key, within the caller's transaction.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    ConflictError
        Code ``idempotency_key_reused``: the key was used for a different signal.
    """
    episodes.get(session, signal.episode_id)
    feedback_id = f"fb_{uuid.uuid4().hex}"
    # The insert itself is the test: of two retries at once, one waits here and then finds the other's row.
    inserted = session.execute(
        insert(Feedback)
        .values(
            id=feedback_id,
            episode_id=signal.episode_id,
            user_id=signal.user,
            kind=signal.kind,
            value=signal.value,
            text=signal.text,
            idempotency_key=signal.idempotency_key,
            body_digest=signal.digest(),
        )
        .on_conflict_do_nothing()
        .returning(Feedback.id)
    ).scalar()
    if inserted is None:
        return _first_receipt(session, signal)
    event = FeedbackGiven(
        feedback_id=feedback_id,
        episode_id=signal.episode_id,
        user_id=signal.user,
        kind=signal.kind,
        value=signal.value,
        text=signal.text,
    )
    outbox.append(session, event, key=signal.episode_id)
    return Receipt(id=feedback_id, episode_id=signal.episode_id, kind=signal.kind, repeated=False)


def _first_receipt(session: Session, signal: Signal) -> Receipt:
    first = session.scalars(
        sa.select(Feedback).where(
            Feedback.user_id == signal.user, Feedback.idempotency_key == signal.idempotency_key
        )
    ).one()
    if first.body_digest != signal.digest():
        raise ConflictError(
            "This idempotency_key was used for a different signal; use a new key for a new signal.",
            code="idempotency_key_reused",
            param="idempotency_key",
        )
    return Receipt(id=first.id, episode_id=first.episode_id, kind=first.kind, repeated=True)


@dataclass(frozen=True, slots=True)
class Standing:
    """The signal of one rater on one episode and kind that stands."""

    feedback_id: str
    seq: int
    episode_id: str
    user_id: str
    kind: str
    value: int | None
    text: str | None


def fold(signals: Iterable[Standing]) -> list[Standing]:
    """Return the signals that stand, in the order in which they were given.

    The latest signal of one rater on one episode and kind stands; a withdrawn thumb stands for nothing.
    The result does not depend on the order or the repetition of the input.
    """
    latest: dict[tuple[str, str, str], Standing] = {}
    for signal in signals:
        key = (signal.episode_id, signal.user_id, signal.kind)
        if key not in latest or latest[key].seq < signal.seq:
            latest[key] = signal
    return sorted((s for s in latest.values() if s.value != 0), key=lambda s: s.seq)


def standing_of(rows: Iterable[Feedback]) -> list[Standing]:
    """Fold feedback rows."""
    return fold(Standing(r.id, r.seq, r.episode_id, r.user_id, r.kind, r.value, r.text) for r in rows)
