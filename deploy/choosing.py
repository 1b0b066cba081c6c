"""What choosing among several answers took lately, told from the episodes' steps."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import Episode

LATELY = timedelta(days=1)


class Choosing(NamedTuple):
    """How often choosing among several answers came to something, and what that took."""

    outcome: str
    num_answers: int
    extra_tokens: int
    p50_ms: float


def lately(session: Session, release: str) -> list[Choosing]:
    """Return what came of it for a release in the last day, the most frequent first; empty where it is off."""
    step = sa.func.jsonb_array_elements(Episode.steps).table_valued("value").render_derived("step")
    told = sa.cast(step.c.value, Episode.steps.type)
    outcome = told["outcome"].astext
    ms = sa.cast(told["ms"].astext, sa.Float)
    query = (
        sa.select(
            outcome,
            sa.func.count(),
            sa.func.sum(sa.cast(told["extra_tokens"].astext, sa.BigInteger)),
            sa.func.percentile_cont(0.5).within_group(ms),
        )
        .select_from(Episode)
        .join(step, sa.true())
        .where(
            Episode.release == release,
            Episode.created_at > sa.func.now() - LATELY,
            told["kind"].astext == "best_of",
        )
        .group_by(outcome)
        .order_by(sa.func.count().desc())
    )
    return [Choosing(what, number, int(tokens), float(p50)) for what, number, tokens, p50 in session.execute(query)]
