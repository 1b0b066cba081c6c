"""What operators decide: gold probes, bans, quarantines, exclusions; each is recorded with its event."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.tables import Episode, User
from infra.errors import ConflictError, NotFoundError
from infra.events import AnswerExcluded, ProbeJudged, RaterRuled
from infra.ids import new_id
from infra.log import outbox
from reward.raters import PROGRAM, Ruling
from reward.tables import GoldProbe, RewardRater
from reward.tables import Ruling as RulingRow


def give_probe(
    session: Session, episode_id: str, *, good: bool, over: str | None = None, operator: str, reason: str
) -> str:
    """Record an operator's judgement of an answer, with its event; return the probe's id.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    ConflictError
        Code ``not_learned_from`` where nothing may be, an operator's judgement included.
    """
    for name in (episode_id, over):
        episode = None if name is None else session.get(Episode, name)
        if name is not None and episode is None:
            raise NotFoundError(f"There is no episode {name!r}.", code="episode_not_found", param="episode_id")
        if episode is not None and not episode.learn:
            raise _not_learned_from()
    probe_id = new_id("go")
    session.add(
        GoldProbe(id=probe_id, episode_id=episode_id, over=over, good=good, operator=operator, reason=reason)
    )
    event = ProbeJudged(probe_id=probe_id, episode_id=episode_id, over=over, good=good)
    outbox.append(session, event, key=episode_id, event_id=probe_id)
    return probe_id


def give_ruling(
    session: Session,
    *,
    rater: str | None = None,
    quarantine: str | None = None,
    ruling: Ruling | None,
    operator: str,
    reason: str,
) -> str:
    """Record an operator's decision about a rater, or about all of a quarantine, with its event; return its id.

    Raises
    ------
    NotFoundError
        Code ``rater_not_found`` or ``quarantine_not_found``.
    """
    if rater is not None and session.get(RewardRater, rater) is None:
        raise NotFoundError(
            f"There is no rater {rater!r}; `everloop reward raters` lists them.", code="rater_not_found"
        )
    held = sa.select(RewardRater.name).where(RewardRater.quarantine == quarantine).limit(1)
    if rater is None and session.scalar(held) is None:
        raise NotFoundError(f"There is no open quarantine {quarantine!r}.", code="quarantine_not_found")
    ruling_id = new_id("ru")
    session.add(
        RulingRow(id=ruling_id, rater=rater, quarantine=quarantine, ruling=ruling, operator=operator, reason=reason)
    )
    event = RaterRuled(rater=rater, quarantine=quarantine, ruling=ruling)
    outbox.append(session, event, key=rater or str(quarantine), event_id=ruling_id)
    return ruling_id


def rater_of(session: Session, name: str) -> str:
    """Return under which name the reward model knows a user, or a program (``program:NAME``).

    Raises
    ------
    NotFoundError
        Code ``user_not_found``.
    """
    known = session.get(User, name)
    if known is None and not name.startswith(PROGRAM):
        raise NotFoundError(f"There is no user {name!r}.", code="user_not_found", param="rater")
    return name if known is None else known.key_id


def exclude(session: Session, episode_id: str) -> None:
    """Have nothing learned from an answer any more, for good, with its event.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``.
    ConflictError
        Code ``not_learned_from`` where nothing is anyway.
    """
    episode = session.get(Episode, episode_id, with_for_update=True)
    if episode is None:
        raise NotFoundError(f"There is no episode {episode_id!r}.", code="episode_not_found", param="episode_id")
    if not episode.learn:
        raise _not_learned_from()
    episode.learn, episode.excluded = False, True
    outbox.append(session, AnswerExcluded(episode_id=episode_id), key=episode_id)


def _not_learned_from() -> ConflictError:
    return ConflictError(
        "Nothing is learned from this answer: its owner, or an operator, said so.", code="not_learned_from"
    )
