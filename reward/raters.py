"""How far a rater is trusted: gold probes, what others like them were worth, and caps on how loud one may be.

A rater's reliability is the probability that a vote of theirs is right. It starts at that of raters with as many
votes (a pool, measured on gold probes: a swarm of fresh accounts is known by the first of them that are checked),
leans on checked votes from the same block of addresses, and is carried by the rater's own checked votes. Below even
odds their votes are set aside, those already learned are taken out, and both come back if the reliability does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

PROGRAM = "program:"
Ruling = Literal["banned", "cleared"]

# Raters are pooled by how many votes they had given: 0, 1, 2 to 3, 4 to 9, 10 and more.
POOL_STARTS = (0, 1, 2, 4, 10)
# What gold probes are taken to have said before there are any: 8 of 10 votes right.
PRIOR_RIGHT, PRIOR_WRONG = 8.0, 2.0
DEFAULT_RELIABILITY = PRIOR_RIGHT / (PRIOR_RIGHT + PRIOR_WRONG)
POOL_STRENGTH = 4.0  # checked votes that the pool is worth to a rater without any
BLOCK_SHARE = 0.5  # what a checked vote from the same addresses is worth, against an own one
FLOOR = 0.5  # at even odds a vote says nothing

FRESH_VOTES = 3  # an account with fewer votes, none of them checked, is fresh
FRESH_WEIGHT = 0.5
# Where fewer people vote there is no crowd that one of them, or a swarm, could shout down.
CROWD = 20
LOUD = 3.0  # votes beyond this multiple of the mean count less and less
LEAST_LOUD = 5.0


@dataclass(slots=True)
class Rater:
    """One rater's record.

    Attributes
    ----------
    block
        Their block of addresses (a /24 or /48 network), where one is known.
    first_at_s
        When they first voted, in seconds since 1970; 0 where time is not known.
    num_seen, num_rated
        Answers that they were given, and those of them that they rated.
    ruling
        What an operator decided; it stands above every count.
    quarantine
        The burst that they were part of, until an operator has looked at it.
    """

    name: str
    num_votes: int = 0
    num_right: int = 0
    num_wrong: int = 0
    set_aside: bool = False
    ruling: Ruling | None = None
    quarantine: str | None = None
    block: str | None = None
    first_at_s: float = 0.0
    num_seen: int = 0
    num_rated: int = 0

    @property
    def is_program(self) -> bool:
        """Whether it is a verifier or judge: loud by nature, and weighed by kind."""
        return self.name.startswith(PROGRAM)

    @property
    def is_fresh(self) -> bool:
        """Whether next to nothing is known of them."""
        return self.num_votes < FRESH_VOTES and not self.num_right and self.ruling != "cleared"

    @property
    def reason_against(self) -> str | None:
        """Why their votes are held, as a stable key, or None."""
        if self.ruling is not None:
            return "rater_banned" if self.ruling == "banned" else None
        if self.quarantine:
            return "rater_quarantined"
        return "rater_set_aside" if self.set_aside else None


@dataclass(slots=True)
class Block:
    """What the raters of one block of addresses did together."""

    num_raters: int = 0
    num_votes: int = 0
    num_right: int = 0
    num_wrong: int = 0


@dataclass(slots=True)
class Pool:
    """Checked votes of raters with about as many votes."""

    right: float = PRIOR_RIGHT
    wrong: float = PRIOR_WRONG

    @property
    def reliability(self) -> float:
        """Share of right votes."""
        return self.right / (self.right + self.wrong)


def new_pools() -> list[Pool]:
    """Return pools that have seen no gold probe."""
    return [Pool() for _ in POOL_STARTS]


@dataclass(slots=True)
class Raters:
    """All raters, and what they are worth together. Pure: the worker stores what :meth:`changed` returns."""

    pools: list[Pool] = field(default_factory=new_pools)
    by_name: dict[str, Rater] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    num_votes: int = 0
    num_voters: int = 0
    num_established: int = 0
    _changed: dict[str, Rater] = field(default_factory=dict)

    def changed(self) -> list[Rater]:
        """Return the raters that changed since this was last asked."""
        found = list(self._changed.values())
        self._changed = {}
        return found

    def get(self, name: str, block: str | None = None, at_s: float = 0.0) -> Rater:
        """Return a rater, known from now on."""
        rater = self.by_name.get(name)
        if rater is None:
            rater = Rater(name, block=block, first_at_s=at_s)
            self.admit(rater)
        self._changed[name] = rater
        return rater

    def reliability(self, rater: Rater) -> float:
        """Return the probability that a vote of theirs is right."""
        right, wrong = float(rater.num_right), float(rater.num_wrong)
        if rater.block is not None:
            block = self.blocks[rater.block]
            right += BLOCK_SHARE * (block.num_right - rater.num_right)
            wrong += BLOCK_SHARE * (block.num_wrong - rater.num_wrong)
        prior = POOL_STRENGTH * self._pool(rater).reliability
        return (prior + right) / (POOL_STRENGTH + right + wrong)

    def counts(self, rater: Rater) -> bool:
        """Tell whether their votes are learned from now."""
        if rater.ruling is not None:
            return rater.ruling == "cleared"
        return rater.quarantine is None and self.reliability(rater) > FLOOR

    def weigh(self, rater: Rater) -> float:
        """Count a vote of theirs and return its weight, in [0, 1]; 0 where it must be set aside."""
        rater.num_votes += 1
        self.num_votes += 1
        self.num_voters += rater.num_votes == 1
        self.num_established += rater.num_votes == FRESH_VOTES
        if rater.block is not None:
            self.blocks[rater.block].num_votes += 1
        if not self.counts(rater):
            return 0.0
        return self._said(rater) * self._heard(rater)

    def check(self, rater: Rater, *, right: bool) -> None:
        """Note that a vote of theirs was held against a gold probe."""
        pool, block = self._pool(rater), self.blocks.get(rater.block) if rater.block else None
        # The pool is about raters, not votes: of one rater, each further check says less of the others.
        share = 1.0 / (1 + rater.num_right + rater.num_wrong)
        if right:
            rater.num_right += 1
            pool.right += share
        else:
            rater.num_wrong += 1
            pool.wrong += share
        if block is not None:
            block.num_right += right
            block.num_wrong += not right
        self._changed[rater.name] = rater

    def unsettled(self, among: Iterable[Rater]) -> list[Rater]:
        """Return those whose votes are in and must out, or the other way."""
        return [rater for rater in among if rater.num_votes and self.counts(rater) == rater.set_aside]

    def fresh_since(self, at_s: float, block: str | None) -> list[Rater]:
        """Return the fresh raters who first voted after `at_s`, of one block or of all."""
        return [
            r
            for r in self.by_name.values()
            if r.first_at_s > at_s and r.is_fresh and (block is None or r.block == block)
        ]

    def _said(self, rater: Rater) -> float:
        """Return what a vote says at this reliability, against one at the default."""
        if rater.ruling == "cleared":
            return 1.0
        said = (2.0 * self.reliability(rater) - 1.0) / (2.0 * DEFAULT_RELIABILITY - 1.0)
        return min(1.0, max(0.0, said))

    def _heard(self, rater: Rater) -> float:
        """Return what is left of a vote after the caps: of fresh accounts, of loud raters, of loud blocks."""
        if self.num_voters < CROWD or rater.ruling == "cleared" or rater.is_program:
            return 1.0
        others = (self.num_votes - rater.num_votes) / (self.num_voters - 1)
        limit = max(LOUD * others, LEAST_LOUD) * (1 + rater.num_right)
        heard = _diminished(rater.num_votes, limit)
        if rater.is_fresh:
            heard *= FRESH_WEIGHT
            if rater.block is not None and self.blocks[rater.block].num_raters > 1:
                heard *= _diminished(self.blocks[rater.block].num_votes, max(LOUD * others, LEAST_LOUD))
        return heard

    def _pool(self, rater: Rater) -> Pool:
        votes = max(rater.num_votes - 1, 0)
        return self.pools[bisect.bisect_right(POOL_STARTS, votes) - 1]

    def admit(self, rater: Rater) -> None:
        """Take in a rater with their record."""
        self.by_name[rater.name] = rater
        self.num_votes += rater.num_votes
        self.num_voters += rater.num_votes > 0
        self.num_established += rater.num_votes >= FRESH_VOTES
        if rater.block is not None:
            block = self.blocks.setdefault(rater.block, Block())
            block.num_raters += 1
            block.num_votes += rater.num_votes
            block.num_right += rater.num_right
            block.num_wrong += rater.num_wrong


def _diminished(count: float, limit: float) -> float:
    """Return the weight of the `count`-th vote: the sum grows with the square root beyond `limit`."""
    return 1.0 if count <= limit else 0.5 * math.sqrt(limit / count)
