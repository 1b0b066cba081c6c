"""Tables of the reward model: features, updates, snapshots, scores."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from infra.db import Base
from infra.tables import Timestamp


class Features(Base):
    """Cached features of one answer in its context (float32), adapter off."""

    __tablename__ = "features"

    encoder: Mapped[str] = mapped_column(primary_key=True)
    answer_digest: Mapped[str] = mapped_column(primary_key=True)
    phi: Mapped[bytes]
    episode_id: Mapped[str | None] = mapped_column(index=True)


class RewardUpdate(Base):
    """One step of the posterior: a site added, or taken out again. The history is the recovery log.

    ``z`` is emptied when the person is forgotten; a snapshot taken then stands for all before it.
    """

    __tablename__ = "reward_updates"

    seq: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    feedback_id: Mapped[str] = mapped_column(index=True)
    action: Mapped[str]
    encoder: Mapped[str]
    z: Mapped[bytes]
    precision: Mapped[float]
    target: Mapped[float]
    p_before: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.UniqueConstraint("feedback_id", "action"),
        sa.CheckConstraint("action IN ('add', 'remove')", name="action"),
    )


class RewardSnapshot(Base):
    """The posterior after `update_seq`; a run pins one, and a worker starts from the newest."""

    __tablename__ = "reward_snapshots"

    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    encoder: Mapped[str]
    update_seq: Mapped[int] = mapped_column(sa.BigInteger)
    theta: Mapped[bytes]
    covariance: Mapped[bytes]
    num_signals: Mapped[int]
    digest: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (sa.UniqueConstraint("encoder", "update_seq"),)


class RewardScore(Base):
    """The newest score of an answer, and the update after which it was computed."""

    __tablename__ = "reward_scores"

    episode_id: Mapped[str] = mapped_column(sa.ForeignKey("episodes.id"), primary_key=True)
    mean: Mapped[float]
    sd: Mapped[float]
    p_good: Mapped[float]
    update_seq: Mapped[int] = mapped_column(sa.BigInteger)
    encoder: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now(), onupdate=sa.func.now())
