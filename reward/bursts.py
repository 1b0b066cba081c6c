"""Bursts: many fresh accounts that suddenly vote together are quarantined until an operator has looked.

For all fresh accounts, and for those of each block of addresses, votes of the last minutes are held against the
same group's own past and against what established raters do meanwhile. On the first day there is no past, and
everybody is new: then nothing is a burst. Time is the signals' own, so a replay sees the same bursts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WINDOW_S = 600.0
PAST_S = 86_400.0
LEAST_VOTES = 30.0
TIMES_USUAL = 8.0
OVER_AT = 10.0
EVERYBODY = "fresh accounts"
MAX_COHORTS = 1_000


@dataclass(slots=True)
class Cohort:
    """Fading counts of a group's votes, and of what established raters did meanwhile."""

    recent: float = 0.0
    past: float = 0.0
    established: float = 0.0
    at_s: float = 0.0
    quarantine: str | None = None

    def advance(self, now_s: float) -> None:
        """Let the counts fade up to `now_s`; time does not run backwards."""
        gone_s = max(0.0, now_s - self.at_s) if self.at_s else 0.0
        self.recent *= math.exp(-gone_s / WINDOW_S)
        self.established *= math.exp(-gone_s / WINDOW_S)
        self.past *= math.exp(-gone_s / PAST_S)
        self.at_s = max(self.at_s, now_s)

    @property
    def is_burst(self) -> bool:
        """Whether this is more than the group's past, and than everybody else."""
        usual = (self.past - self.recent) * WINDOW_S / PAST_S
        return self.recent > LEAST_VOTES and self.recent > TIMES_USUAL * usual and self.recent > self.established


@dataclass(slots=True)
class Bursts:
    """All cohorts that were seen lately."""

    cohorts: dict[str, Cohort] = field(default_factory=dict)
    since_s: float = 0.0

    def note_time(self, now_s: float) -> None:
        """Note that there was a vote at all: the first one begins the first day."""
        self.since_s = self.since_s or now_s

    def established_voted(self, now_s: float) -> None:
        """Count a vote of a rater who is not fresh."""
        for cohort in self.cohorts.values():
            cohort.advance(now_s)
            cohort.established += 1.0

    def fresh_voted(self, block: str | None, now_s: float, quarantine_id: str) -> tuple[str, str | None] | None:
        """Count a vote of a fresh account; return the quarantine that it falls into, and of which block it is.

        Parameters
        ----------
        quarantine_id
            The name of a quarantine that this vote would open.
        """
        self.note_time(now_s)
        names = [EVERYBODY, *([block] if block else [])]
        found: tuple[str, str | None] | None = None
        for name in names:
            cohort = self.cohorts.setdefault(name, Cohort())
            cohort.advance(now_s)
            cohort.recent += 1.0
            cohort.past += 1.0
            if cohort.quarantine is None and cohort.is_burst and now_s - self.since_s >= PAST_S:
                cohort.quarantine = quarantine_id
            elif cohort.quarantine is not None and cohort.recent < OVER_AT:
                cohort.quarantine = None
            if cohort.quarantine is not None:
                found = cohort.quarantine, None if name == EVERYBODY else name
        self._drop_quiet_ones()
        return found

    def _drop_quiet_ones(self) -> None:
        if len(self.cohorts) > MAX_COHORTS:
            keep = sorted(self.cohorts, key=lambda name: -self.cohorts[name].past)[: MAX_COHORTS // 2]
            self.cohorts = {name: self.cohorts[name] for name in {*keep, EVERYBODY} if name in self.cohorts}
