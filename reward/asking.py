"""Whose rating to ask for: some answers at random, and those that would teach the most; and who rates by choice.

Chance is taken from the episode's id, so an event that is applied again asks for the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import Episode
from infra.events import RatingSolicited
from infra.log import outbox
from infra.log.outbox import Entry
from infra.settings import Settings
from reward import propensity
from reward.learner import Learner
from reward.online import Score
from reward.patience import Patience
from reward.style import style_features
from reward.tables import RatingChoice, Solicitation

OPEN_ANSWERS = 200  # this many answers later, one counts as rated or not rated


def expected_gain(score: Score) -> float:
    """Return what a vote would teach: the expected loss of entropy of the answer's logit, in nats."""
    return 0.5 * math.log1p(score.p_good * (1.0 - score.p_good) * score.sd**2)


def chance(episode_id: str, purpose: str) -> float:
    """Return a number in [0, 1) that is always the same for an episode and purpose."""
    digest = hashlib.sha256(f"{purpose} {episode_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2.0**64


def decide(episode_id: str, *, informative: bool, settings: Settings) -> tuple[str | None, float]:
    """Return why a rating is asked for (None where it is not), and the probability with which it was to be."""
    at_random, of_informative = settings.ask_share, settings.ask_informative_share if informative else 0.0
    propensity = at_random + (1.0 - at_random) * of_informative
    if chance(episode_id, "ask") < at_random:
        return "random", propensity
    return ("informative" if chance(episode_id, "informative") < of_informative else None), propensity


def form_of(episode_id: str, reason: str, settings: Settings) -> Literal["rating", "pair"]:
    """Return what is asked for: a rating, or a choice between the answer and another one.

    What is asked for at random anchors the ratings of those who rate by choice, so it is always a rating.
    """
    is_pair = reason == "informative" and chance(episode_id, "pair") < settings.ask_pair_share
    return "pair" if is_pair else "rating"


def note_answers(
    session: Session,
    learner: Learner,
    answers: Sequence[Episode],
    scores: Mapping[str, Score],
    raters: Mapping[str, str],
    settings: Settings,
) -> None:
    """Ask for ratings of new answers, and learn which of the older ones were rated.

    Parameters
    ----------
    scores
        The head's, by episode.
    raters
        The rater's name, by user.
    """
    choices, asked = [], list[RatingSolicited]()
    patience = Patience(session, answers, settings)
    for answer in answers:
        score = scores[answer.id]
        is_high = learner.guards.asking.is_high(expected_gain(score))
        informative = is_high and patience.allows(answer.user_id, answer.created_at)
        reason, ask_propensity = decide(answer.id, informative=informative, settings=settings)
        rater = learner.raters.get(raters[answer.user_id])
        x = propensity.inputs(
            learner.p_good(score),
            score.sd,
            float(style_features(answer.answer)[0]),
            rater.num_seen,
            rater.num_rated,
            asked=reason is not None,
        )
        rater.num_seen += 1
        choices.append({"episode_id": answer.id, "inputs": [*map(float, x), ask_propensity], "rated": None})
        if reason is not None:
            patience.note(answer.user_id, answer.created_at)
            form = form_of(answer.id, reason, settings)
            asked.append(RatingSolicited(episode_id=answer.id, reason=reason, propensity=ask_propensity, form=form))
    session.execute(insert(RatingChoice).on_conflict_do_nothing(), choices)
    if asked:
        _ask(session, asked)
    _close_old_ones(session, learner)


def _ask(session: Session, asked: Sequence[RatingSolicited]) -> None:
    """Write what is asked for, but never a second time about an answer."""
    rows = [event.model_dump(include={"episode_id", "reason", "propensity", "form"}) for event in asked]
    new = set(
        session.scalars(
            insert(Solicitation).values(rows).on_conflict_do_nothing().returning(Solicitation.episode_id)
        )
    )
    outbox.append_many(session, [Entry(event, event.episode_id) for event in asked if event.episode_id in new])


def _close_old_ones(session: Session, learner: Learner) -> None:
    """Learn who rated and who did not, both at one age: ratings come early, and would otherwise count alone."""
    still_open = sa.select(RatingChoice).where(RatingChoice.rated.is_(None))
    for choice in session.scalars(still_open.order_by(RatingChoice.episode_id.desc()).offset(OPEN_ANSWERS)):
        choice.rated = choice.weight is not None
        learner.guards.propensity.learn(np.array(choice.inputs[:-1]), rated=choice.rated)


def note_rating(
    learner: Learner, choice: RatingChoice, rater: str, verdict: float, *, asked_at_random: bool
) -> float:
    """Return the weight of a rating; take note that the answer is rated, if that is new."""
    if choice.weight is None:
        x, ask_propensity = np.array(choice.inputs[:-1]), choice.inputs[-1]
        choice.weight = learner.guards.propensity.weight(x, ask_propensity)
        learner.guards.anchor.observe(verdict, choice.weight, asked_at_random=asked_at_random)
        learner.raters.get(rater).num_rated += 1
    return choice.weight
