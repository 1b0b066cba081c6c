"""From the log to a dataset: what consenting people said of whole answers, by rules that are counted.

The same range of the log gives the same bytes, as long as consent, trust in raters and redaction are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from feedback.fold import Standing, standing_of
from feedback.tables import Episode, Feedback, User
from feedback.users import TOMBSTONE
from infra.db import among
from reward.observations import reason_against
from reward.raters import CROWD
from reward.state import reasons_against_raters
from trainer.redactor import Redactor
from trainer.snapshot import Example, Snapshot

TRAINED_KINDS = frozenset({"thumb", "rating", "correction", "preference"})
BEST_RATING = 5
GATE_PART = 5  # one conversation in five is kept for gates
HELD_OUT_PART = 10  # and one user in ten, but for the first: a small house must not lose a tenth of its people
USER_SHARE = 0.1  # of the answers that train may be one user's, where there is a crowd


@dataclass(frozen=True, slots=True)
class _Said:
    """An answer with the signals on it that teach."""

    episode: Episode
    signals: list[Standing]
    conversation: str
    user_held_out: bool

    @property
    def judges(self) -> bool:
        return self.user_held_out or is_held_out(self.conversation)


def settled_seq(session: Session) -> int:
    """Return the number of the newest signal; whoever is still writing one gets a higher number.

    Without the lock a signal with a lower number could be committed later, and the same range would hold more.
    Writers lock the table before they draw their numbers (:mod:`feedback.acceptance`).
    """
    session.execute(sa.text("LOCK TABLE feedback IN SHARE MODE"))
    return session.scalar(sa.select(sa.func.max(Feedback.seq))) or 0


def take(
    session: Session,
    redactor: Redactor,
    after_seq: int = 0,
    through_seq: int | None = None,
    max_user_share: float = USER_SHARE,
) -> Snapshot:
    """Freeze what may be learned from: consenting, whole answers with signals that stand.

    Parameters
    ----------
    redactor
        Takes personal data out of every text.
    after_seq
        Signals above this number count as new.
    through_seq
        The newest signal that is looked at; by default the newest there is. Call :func:`settled_seq` for it in a
        transaction of its own: its lock keeps writers waiting until that ends.
    max_user_share
        Most of the answers that train which one user may have given, where at least 20 users did.
    """
    rows = session.execute(
        sa.select(Feedback, Episode)
        .join(Episode, Episode.id == Feedback.episode_id)
        .options(defer(Episode.token_ids), defer(Episode.logprobs))  # most of an episode's bytes
        .where(sa.true() if through_seq is None else Feedback.seq <= through_seq)
        .order_by(Episode.id, Feedback.seq)
    ).all()
    standing = standing_of(signal for signal, _ in rows)
    set_aside = Counter({"superseded_or_withdrawn": len(rows) - len(standing)})
    episodes = {episode.id: episode for _, episode in rows}
    said = _usable(session, standing, episodes, set_aside)
    trains, judges = _split(said, set_aside)
    trains = _capped(trains, max_user_share, set_aside)
    others = _preferred_over(session, [*trains, *judges])
    snapshot = Snapshot(
        train=[_example(one, others, redactor) for one in trains],
        gate=[_example(one, others, redactor) for one in judges],
        last_signal_seq=max((signal.seq for signal, _ in rows), default=0),
        num_new_signals=sum(signal.seq > after_seq for signal, _ in rows),
        num_users=len({one.episode.user_id for one in trains}),
    )
    set_aside.update({f"redacted_{what}": n for what, n in redactor.pop_counts().items()})
    snapshot.set_aside = {reason: n for reason, n in sorted(set_aside.items()) if n}
    return snapshot


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of how a conversation began: all up to the first message of the user."""
    begun: list[Any] = []
    for message in messages:
        begun.append(message["content"])
        if message["role"] == "user":
            break
    return hashlib.sha256(json.dumps(begun, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


def is_held_out(conversation: str) -> bool:
    """Tell whether a conversation is kept for gates, by its digest alone: no draw of chance moves it."""
    return int(conversation[:8], 16) % GATE_PART == 0


def is_held_out_user(key_id: str) -> bool:
    """Tell whether a user is one of those kept for gates, by the id of their key alone."""
    return hashlib.sha256(key_id.encode()).digest()[0] % HELD_OUT_PART == 0


def forgotten(session: Session, episode_ids: Collection[str]) -> set[str]:
    """Return which of the episodes are of users who were forgotten since."""
    query = sa.select(Episode.id).where(among(Episode.id, episode_ids), Episode.user_id.startswith(TOMBSTONE))
    return set(session.scalars(query))


def _usable(
    session: Session, standing: Iterable[Standing], episodes: Mapping[str, Episode], set_aside: Counter[str]
) -> list[_Said]:
    """Return the answers that may be learned from, with the signals that teach, oldest first."""
    by_episode: dict[str, list[Standing]] = defaultdict(list)
    for signal in standing:
        by_episode[signal.episode_id].append(signal)
    users = {signal.user_id for signals in by_episode.values() for signal in signals}
    users |= {episode.user_id for episode in episodes.values()}
    named = sa.select(User.user_id, User.key_id).where(among(User.user_id, users))
    keys = dict(session.execute(named).all())
    first = set(session.scalars(sa.select(User.key_id).order_by(User.created_at, User.key_id).limit(CROWD)))
    distrusted = reasons_against_raters(session)
    found = []
    for episode_id in sorted(by_episode):
        episode, signals = episodes[episode_id], by_episode[episode_id]
        if reason := _reason_against(episode):
            set_aside[reason] += len(signals)
            continue
        used = []
        for signal in signals:
            reason = distrusted.get(keys.get(signal.user_id, ""))
            if signal.kind not in TRAINED_KINDS:
                reason = "kind_not_trained"
            if reason:
                set_aside[reason] += 1
            else:
                used.append(signal)
        if used:
            key = keys.get(episode.user_id, "")
            held_out = key not in first and is_held_out_user(key)
            found.append(_Said(episode, used, conversation_of(episode.messages), held_out))
    return found


def _reason_against(episode: Episode) -> str | None:
    if episode.learn and episode.status != "complete":
        return f"answer_{episode.status}"
    return reason_against(episode)


def _split(said: Sequence[_Said], set_aside: Counter[str]) -> tuple[list[_Said], list[_Said]]:
    """Return (what trains, what judges); no conversation and no held-out user is in both."""
    trains = [one for one in said if not one.judges]
    trained = {one.conversation for one in trains}
    judges = []
    for one in said:
        if one.judges and one.conversation in trained:
            set_aside["conversation_trains"] += len(one.signals)
        elif one.judges:
            reason = "user_held_out" if one.user_held_out else "conversation_held_out"
            set_aside[reason] += len(one.signals)
            judges.append(one)
    return trains, judges


def _capped(trains: list[_Said], max_share: float, set_aside: Counter[str]) -> list[_Said]:
    """Leave out the older answers of users who gave more than their share."""
    by_user: dict[str, list[_Said]] = defaultdict(list)
    for one in trains:
        by_user[one.episode.user_id].append(one)
    if len(by_user) < CROWD:
        return trains
    most = max(1, int(max_share * len(trains)))
    over = {one.episode.id: one for theirs in by_user.values() for one in theirs[:-most]}
    set_aside["over_user_cap"] += sum(len(one.signals) for one in over.values())
    return [one for one in trains if one.episode.id not in over]


def _preferred_over(session: Session, said: Iterable[_Said]) -> dict[str, str]:
    """Return the answers that others were preferred to, where they may be learned from too, by episode."""
    named = {signal.over for one in said for signal in one.signals if signal.over}
    rows = session.scalars(sa.select(Episode).where(among(Episode.id, named)))
    return {episode.id: episode.answer for episode in rows if _reason_against(episode) is None}


def _example(one: _Said, others: Mapping[str, str], redactor: Redactor) -> Example:
    signals = one.signals
    return Example(
        episode_id=one.episode.id,
        conversation=one.conversation,
        messages=redactor.messages(one.episode.seen),
        answer=redactor.text(one.episode.answer),
        verdicts=[verdict for signal in signals if (verdict := _verdict(signal)) is not None],
        corrections=[redactor.text(s.text) for s in signals if s.kind == "correction" and s.text],
        preferred_over=[
            redactor.text(others[s.over]) for s in signals if s.kind == "preference" and s.over and s.over in others
        ],
        feedback_ids=[s.feedback_id for s in signals],
    )


def _verdict(signal: Standing) -> float | None:
    if signal.value is None:
        return None
    if signal.kind == "thumb":
        return float(signal.value > 0)
    return (signal.value - 1) / (BEST_RATING - 1) if signal.kind == "rating" else None
