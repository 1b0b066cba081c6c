"""``/operate/rollout``: a candidate among users; its steps, evidence and gates, why, and the ways to decide."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deploy import autonomy, canary, explanation, head, loop
from deploy.api import CanaryId
from deploy.canary import Follower
from deploy.followers import Followers
from deploy.gates import wilson_interval
from deploy.pages.rendering import Chart, Page, Series
from deploy.rollout import BETTER, WORSE, Arm, Rollout, Tally
from deploy.tables import Canary
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import transaction

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

MAX_LISTED = 30
ARMS: tuple[Arm, ...] = ("challenger", "champion")


@router.get("/rollout")
def rollout_page(request: Request, csv: str | None = None) -> Response:
    """Serve the open canary, or the last one."""
    return _respond(request, None, csv)


@router.get("/rollout/{canary_id}")
def canary_page(canary_id: CanaryId, request: Request, csv: str | None = None) -> Response:
    """Serve a canary."""
    return _respond(request, canary_id, csv)


def _respond(request: Request, canary_id: int | None, csv: str | None) -> Response:
    followers: Followers = request.app.state.canary_followers
    settings = request.app.state.settings
    with followers.lock, transaction(request.app.state.sessions) as session:
        current = head.read(session)
        listed = canary.newest(session, MAX_LISTED)
        wanted = canary_id or current.canary_id or (listed[0].id if listed else None)
        context: dict[str, Any] = {
            "head": current,
            "rolls_back_to": loop.rolls_back_to(session),
            "level": autonomy.level(session, settings),
            "levels": autonomy.LEVELS,
            "canaries": listed,
            "canary": None,
        }
        if wanted is None:
            return Page("rollout.html", context).respond(request, csv)
        found = canary.get(session, wanted)
        follower = followers.catch_up(session, found)
        assert follower.rollout is not None
        context |= _told(found, follower.rollout)
        return Page("rollout.html", context, _charts(follower, follower.rollout)).respond(request, csv)


def _told(found: Canary, rollout: Rollout) -> dict[str, Any]:
    tests = rollout.tests
    return {
        "canary": found,
        "rollout": rollout,
        "plan": rollout.plan,
        "sentence": rollout.sentence(),
        "difference": explanation.difference(rollout),
        "votes": [(arm, *_share(rollout.tallies[arm].good, rollout.tallies[arm].votes)) for arm in ARMS],
        "guardrails": [
            {
                "rule": rule,
                "test": tests[rule.name],
                "arms": [_flagged(rollout.tallies[arm], rule.name) for arm in ARMS],
            }
            for rule in rollout.plan.guardrails
        ],
        "quality": [(name, tests[name], _way(tests[name].highest, tests[name].limit)) for name in (BETTER, WORSE)],
    }


def _share(some: int, of: int) -> tuple[int, int, float, float]:
    """Return a count with its total, and the interval of its share."""
    return some, of, *wilson_interval(some, of)


def _flagged(tally: Tally, name: str) -> tuple[int, int, float, float]:
    return _share(tally.flags.get(name, 0), tally.trials)


def _way(e: float, limit: float) -> float:
    """Return how far an e-value is on its way to the limit, in logarithm, from 0 to 1."""
    return min(max(math.log(max(e, 1.0)) / math.log(limit), 0.0), 1.0)


def _charts(follower: Follower, rollout: Rollout) -> list[Chart]:
    limits = [rollout.tests[name].limit for name in (BETTER, WORSE)]
    evidence = [(p.at_s / 60.0, p.e[BETTER], p.e[WORSE], *limits) for p in follower.points]
    votes = [(p.at_s / 60.0, *(_hundredfold(p.good[arm]) for arm in ARMS)) for p in follower.points]
    return [
        Chart(
            id="evidence",
            title="Evidence over time",
            says="E-values of the two tests: the challenger is promoted when “better” reaches its limit, and "
            "rolled back when “worse” does.",
            x="minutes since it opened",
            series=[
                Series("better"),
                Series("worse"),
                Series("limit of better", "limit"),
                Series("limit of worse", "limit"),
            ],
            rows=evidence,
            is_log=True,
        ),
        Chart(
            id="votes",
            title="Good votes by arm",
            says="The share of good votes of each arm so far.",
            x="minutes since it opened",
            series=[Series("challenger"), Series("champion")],
            rows=votes,
            unit="%",
        ),
    ]


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100.0 * share
