"""Tables of the reward model: features, updates, snapshots, scores, raters, and what guards them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
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
    """One step of the posterior; the history is the recovery log.

    ``add``: a site is added. ``remove``: it is taken out again, for good. ``hold``: the signal is set aside (its
    site, if it had one, is out), to come in when its rater is trusted. ``inflate``: the posterior is widened by
    `precision`. `verdict` and `weight` are the observation's, `precision` and `target` the site's. ``z`` is emptied
    when the person is forgotten; a snapshot taken then stands for all before it.
    """

    __tablename__ = "reward_updates"

    seq: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    feedback_id: Mapped[str] = mapped_column(index=True)
    action: Mapped[str]
    encoder: Mapped[str]
    key: Mapped[str]
    z: Mapped[bytes]
    verdict: Mapped[float]
    weight: Mapped[float]
    precision: Mapped[float]
    target: Mapped[float]
    inflation: Mapped[float] = mapped_column(server_default="1")
    p_before: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (sa.CheckConstraint("action IN ('add', 'remove', 'hold', 'inflate')", name="action"),)


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
    abstain: Mapped[bool] = mapped_column(server_default=sa.false())
    update_seq: Mapped[int] = mapped_column(sa.BigInteger)
    encoder: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now(), onupdate=sa.func.now())


class RewardState(Base):
    """Everything beside the posterior and the raters (:class:`reward.learner.Guards`), in step with the updates."""

    __tablename__ = "reward_state"

    encoder: Mapped[str] = mapped_column(primary_key=True)
    guards: Mapped[dict[str, Any]] = mapped_column(JSONB)
    update_seq: Mapped[int] = mapped_column(sa.BigInteger)
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now(), onupdate=sa.func.now())


class RewardRater(Base):
    """A rater's record (:class:`reward.raters.Rater`).

    A person goes by the id of their key, which says nothing of them and outlives their name; a program by its name.
    """

    __tablename__ = "reward_raters"

    name: Mapped[str] = mapped_column(primary_key=True)
    num_votes: Mapped[int]
    num_right: Mapped[int]
    num_wrong: Mapped[int]
    set_aside: Mapped[bool]
    ruling: Mapped[str | None]
    quarantine: Mapped[str | None] = mapped_column(index=True)
    block: Mapped[str | None]
    first_at_s: Mapped[float]
    num_seen: Mapped[int] = mapped_column(server_default="0")
    num_rated: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (sa.CheckConstraint("ruling IN ('banned', 'cleared')", name="ruling"),)


class GoldProbe(Base):
    """What is known of an answer (or of two), by an operator's own judgement: raters are held against it.

    `judged` tells that the reward model has done so; what comes later is held against it as it comes.
    """

    __tablename__ = "gold_probes"

    id: Mapped[str] = mapped_column(primary_key=True)
    episode_id: Mapped[str] = mapped_column(index=True)
    over: Mapped[str | None]
    good: Mapped[bool]
    judged: Mapped[bool] = mapped_column(server_default=sa.false())
    operator: Mapped[str]
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class Ruling(Base):
    """What an operator decided about a rater or a quarantine; append-only."""

    __tablename__ = "rater_rulings"

    id: Mapped[str] = mapped_column(primary_key=True)
    rater: Mapped[str | None]
    quarantine: Mapped[str | None]
    ruling: Mapped[str | None]
    operator: Mapped[str]
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())


class RatingChoice(Base):
    """Whether an answer was rated, and what the choice may have depended on.

    `weight` is what its ratings weigh, decided at the first of them: a later one, and learning anew, find the same.
    `rated` is null while the answer is new; then, whether there was a rating by that time.
    """

    __tablename__ = "rating_choices"

    episode_id: Mapped[str] = mapped_column(primary_key=True)
    inputs: Mapped[list[float]] = mapped_column(ARRAY(sa.Float))
    rated: Mapped[bool | None]
    weight: Mapped[float | None]

    __table_args__ = (sa.Index("ix_rating_choices_open", "episode_id", postgresql_where=sa.text("rated IS NULL")),)


class Solicitation(Base):
    """A rating (or, as a ``pair``, a choice between two answers) was asked for: at random, or to learn much."""

    __tablename__ = "solicitations"

    episode_id: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str]
    propensity: Mapped[float]
    form: Mapped[str] = mapped_column(default="rating", server_default="rating")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.CheckConstraint("reason IN ('random', 'informative')", name="reason"),
        sa.CheckConstraint("form IN ('rating', 'pair')", name="form"),
        sa.CheckConstraint("propensity > 0 AND propensity <= 1", name="propensity"),
    )


class RewardEncoder(Base):
    """A version of the features: a trained backbone, or a frozen encoder that one replaced. At most one is active.

    While none is, the frozen encoder of the settings serves.
    """

    __tablename__ = "reward_encoders"

    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    adapter_path: Mapped[str | None]
    adapter_digest: Mapped[str | None]
    status: Mapped[str]
    evaluation: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=sa.func.now())

    __table_args__ = (
        sa.CheckConstraint("kind IN ('base-model', 'sentence', 'backbone')", name="kind"),
        sa.CheckConstraint("status IN ('active', 'candidate', 'rejected', 'retired')", name="status"),
        sa.Index("ix_reward_encoders_active", "status", unique=True, postgresql_where=sa.text("status = 'active'")),
    )
