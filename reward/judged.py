"""The accumulated comparisons: pairs of answers to one prompt, of which people said which is better."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.fold import Standing, as_standing, standing_ids
from feedback.tables import Episode, Feedback
from feedback.users import TOMBSTONE
from reward.observations import LEARNED_KINDS, reason_against

LIKED_RATING = 4
DISLIKED_RATING = 2


@dataclass(frozen=True, slots=True)
class Judged:
    """Two answers to one prompt, the first judged better.

    Parameters
    ----------
    kind
        How it was said: ``preference``, ``correction``, or ``contrast`` (one was liked, the other disliked).
    feedback_ids
        The signals that say it.
    episode_ids
        The episodes of the chosen and the rejected answer (of a correction: the same twice).
    seq
        When the last of the signals was accepted.
    """

    messages: list[dict[str, Any]]
    chosen: str
    rejected: str
    kind: str
    feedback_ids: tuple[str, ...]
    episode_ids: tuple[str, str]
    seq: int


def collect_pairs(session: Session) -> list[Judged]:
    """Return the comparisons that stand, in the order in which they were given.

    Only answers whose users consent, and were not forgotten.
    """
    return pair_up(*standing_signals(session))


def standing_signals(session: Session) -> tuple[list[Standing], dict[str, Episode]]:
    """Return the signals that stand and teach, in their order, and the usable episodes that they concern."""
    rows = session.scalars(
        sa.select(Feedback)
        .where(
            Feedback.id.in_(standing_ids()),
            Feedback.kind.in_(LEARNED_KINDS),
            ~Feedback.user_id.startswith(TOMBSTONE),
        )
        .order_by(Feedback.seq)
    )
    signals = [as_standing(row) for row in rows]
    named = {s.episode_id for s in signals} | {s.over for s in signals if s.over}
    episodes = session.scalars(sa.select(Episode).where(Episode.id.in_(named)))
    return signals, {e.id: e for e in episodes if usable(e)}


def usable(episode: Episode | None) -> bool:
    """Tell whether an answer may be learned from, and says anything."""
    return episode is not None and reason_against(episode) is None and not episode.user_id.startswith(TOMBSTONE)


def pair_up(signals: Iterable[Standing], episodes: Mapping[str, Episode]) -> list[Judged]:
    """Return the comparisons that standing signals make between the answers of `episodes`.

    Where several answers to one prompt were liked and several disliked, the first liked stands against the first
    disliked and so on: each answer is used once, so that no popular prompt outweighs the rest.
    """
    pairs: list[Judged] = []
    votes: dict[str, list[Standing]] = defaultdict(list)
    for signal in signals:
        episode = episodes.get(signal.episode_id)
        if episode is None:
            continue
        if signal.kind in ("thumb", "rating"):
            votes[episode.id].append(signal)
        elif signal.kind == "correction" and signal.text:
            pairs.append(_pair("correction", (episode, signal.text), (episode, episode.answer), [signal]))
        elif signal.kind == "preference" and (other := episodes.get(signal.over or "")) is not None:
            pairs.append(_pair("preference", (episode, episode.answer), (other, other.answer), [signal]))
    pairs += _contrasts(votes, episodes)
    told_apart = [p for p in pairs if p.chosen.strip() and p.chosen.strip() != p.rejected.strip()]
    return sorted(told_apart, key=lambda pair: (pair.seq, pair.feedback_ids))


def _contrasts(votes: Mapping[str, Sequence[Standing]], episodes: Mapping[str, Episode]) -> list[Judged]:
    liked: dict[str, list[Episode]] = defaultdict(list)
    disliked: dict[str, list[Episode]] = defaultdict(list)
    # By the vote that came first, so that a later one changes no pair that stands already.
    for episode_id, said in sorted(votes.items(), key=lambda item: min(s.seq for s in item[1])):
        balance = sum(_sign(signal) for signal in said)
        if balance:
            side = liked if balance > 0 else disliked
            side[prompt_digest(episodes[episode_id].seen)].append(episodes[episode_id])
    return [
        _pair("contrast", (good, good.answer), (bad, bad.answer), [*votes[good.id], *votes[bad.id]])
        for prompt, found in liked.items()
        for good, bad in zip(found, disliked[prompt], strict=False)
    ]


def _sign(signal: Standing) -> int:
    value = signal.value or 0
    if signal.kind == "thumb":
        return value
    return 1 if value >= LIKED_RATING else -1 if value <= DISLIKED_RATING else 0


def _pair(
    kind: str, chosen: tuple[Episode, str], rejected: tuple[Episode, str], said: Sequence[Standing]
) -> Judged:
    return Judged(
        messages=chosen[0].seen,
        chosen=chosen[1],
        rejected=rejected[1],
        kind=kind,
        feedback_ids=tuple(signal.feedback_id for signal in sorted(said, key=lambda signal: signal.seq)),
        episode_ids=(chosen[0].id, rejected[0].id),
        seq=max(signal.seq for signal in said),
    )


def prompt_digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what is equal for answers to the same prompt."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()


def pairs_digest(pairs: Sequence[Judged]) -> str:
    """Return the SHA-256 of what pairs say."""
    text = json.dumps([[p.messages, p.chosen, p.rejected, p.kind] for p in pairs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
