"""Tables of what happened: episodes, and what people said of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base
from infra.tables import Timestamp


class Episode(Base):
    """One answer, with all that is needed to learn from it."""

    __tablename__ = "episodes"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now(), index=True)
    user_id: Mapped[str] = mapped_column(index=True)
    release: Mapped[str]
    adapter_digest: Mapped[str | None]
    canary_id: Mapped[int | None] = mapped_column(index=True)
    arm: Mapped[str]
    propensity: Mapped[float]
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    answer: Mapped[str]
    status: Mapped[str]
    finish_reason: Mapped[str | None]
    sampling: Mapped[dict[str, Any]] = mapped_column(JSONB)
    token_ids: Mapped[list[int]] = mapped_column(ARRAY(sa.Integer))
    logprobs: Mapped[list[float]] = mapped_column(ARRAY(sa.Float))
    num_prompt_tokens: Mapped[int]
    ttft_ms: Mapped[float | None]
    latency_ms: Mapped[float]
    learn: Mapped[bool]

    __table_args__ = (
        sa.CheckConstraint("status IN ('complete', 'interrupted', 'failed')", name="status"),
        sa.CheckConstraint("propensity > 0 AND propensity <= 1", name="propensity"),
    )


class Feedback(Base):
    """One signal; append-only. The latest of one rater on one episode and kind stands."""

    __tablename__ = "feedback"

    seq: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    episode_id: Mapped[str] = mapped_column(sa.ForeignKey("episodes.id"), index=True)
    user_id: Mapped[str]
    kind: Mapped[str]
    value: Mapped[int | None] = mapped_column(sa.SmallInteger)
    text: Mapped[str | None]
    idempotency_key: Mapped[str]
    body_digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.UniqueConstraint("user_id", "idempotency_key"),
        sa.CheckConstraint("kind IN ('thumb', 'correction')", name="kind"),
        sa.CheckConstraint("kind <> 'thumb' OR value IN (-1, 0, 1)", name="thumb_value"),
        sa.CheckConstraint("kind <> 'correction' OR text IS NOT NULL", name="correction_text"),
    )
