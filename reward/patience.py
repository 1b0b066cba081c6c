"""How often people are asked about answers that would teach much: so often a day, and not again at once.

What is asked at random is not held back, or it would not be random; but it counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import Episode
from infra.db import among
from infra.ids import first_id
from infra.settings import Settings
from reward.tables import Solicitation

DAY = timedelta(days=1)


class Patience:
    """When the people who asked for these answers were asked for ratings, of late.

    Times are those of the answers: an event that is applied late is decided as it would have been in time.
    """

    def __init__(self, session: Session, answers: Sequence[Episode], settings: Settings) -> None:
        self.per_day = settings.ask_per_day
        self.gap = timedelta(seconds=settings.ask_gap_s)
        self._asked: defaultdict[str, list[datetime]] = defaultdict(list)
        since = min(answer.created_at for answer in answers) - max(DAY, self.gap)
        asked = sa.select(Episode.user_id, Episode.created_at).where(
            among(Episode.user_id, {answer.user_id for answer in answers}),
            Episode.id >= first_id("ep", since),
            sa.exists().where(Solicitation.episode_id == Episode.id),
        )
        for user_id, at in session.execute(asked):
            self.note(user_id, at)

    def allows(self, user_id: str, at: datetime) -> bool:
        """Tell whether somebody may be asked about an answer of that time because it would teach much."""
        distances = [abs(at - other) for other in self._asked[user_id]]
        of_the_day = sum(distance < DAY for distance in distances)
        return of_the_day < self.per_day and all(distance >= self.gap for distance in distances)

    def note(self, user_id: str, at: datetime) -> None:
        """Take note that somebody is asked."""
        self._asked[user_id].append(at)
