"""Dataset snapshots: what a run may learn from, frozen, with a digest.

The split is by prompt and depends on nothing else, so a prompt that trains once never gates later.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.fold import Standing, standing_of
from feedback.tables import Episode, Feedback
from feedback.users import TOMBSTONE
from reward.style import num_words
from trainer.redactor import Redactor

DATASET_FILE = "dataset.jsonl"
TRAINED_KINDS = frozenset({"thumb", "correction"})
GATE_PART = 5  # one prompt in five is kept for gates


@dataclass(frozen=True, slots=True)
class Example:
    """An answer that people said something of."""

    episode_id: str
    messages: list[dict[str, Any]]
    answer: str
    thumbs: list[int]
    corrections: list[str]
    feedback_ids: list[str]


@dataclass(slots=True)
class Snapshot:
    """The frozen data of one run."""

    train: list[Example] = field(default_factory=list)
    gate: list[Example] = field(default_factory=list)
    set_aside: dict[str, int] = field(default_factory=dict)
    last_signal_seq: int = 0
    num_new_signals: int = 0

    @property
    def num_signals(self) -> int:
        """Signals that the run may learn from."""
        return sum(len(example.feedback_ids) for example in self.train)

    def to_jsonl(self) -> str:
        """Return the snapshot as JSON lines, the same bytes for the same data."""
        lines = [
            json.dumps({"split": split, **asdict(example)}, sort_keys=True, ensure_ascii=False)
            for split, examples in (("train", self.train), ("gate", self.gate))
            for example in examples
        ]
        return "".join(f"{line}\n" for line in lines)

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON lines."""
        return hashlib.sha256(self.to_jsonl().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the JSON lines, whole or not at all."""
        write_lines(path, self.to_jsonl())

    def well_rated_words(self, tail: float = 0.05) -> tuple[int, int]:
        """Return the range of lengths (words) that people rated well or wrote themselves.

        Training may move the length within it, and not beyond: what a reward allows, a policy takes.

        Parameters
        ----------
        tail
            Part of the answers left out at either end.
        """
        words = sorted(
            [num_words(e.answer) for e in self.train if sum(e.thumbs) > 0]
            + [num_words(text) for e in self.train for text in e.corrections]
        )
        if not words:
            return 0, 1_000_000
        cut = int(len(words) * tail)
        return words[cut], words[-1 - cut]


def write_lines(path: Path, text: str) -> None:
    """Write a dataset's lines so that a crash leaves the old file or the new one."""
    staging = path.with_suffix(".new")
    staging.write_text(text)
    staging.replace(path)


def episode_of(line: str) -> str | None:
    """Return the episode that a line of a dataset is about; None for what is no such line."""
    try:
        return str(json.loads(line)["episode_id"])
    except (ValueError, KeyError, TypeError):
        return None


def is_gate_prompt(messages: list[dict[str, Any]]) -> bool:
    """Tell whether a prompt is kept for gates, by its digest alone."""
    text = json.dumps([message["content"] for message in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()[0] % GATE_PART == 0


def take(session: Session, redactor: Redactor, after_seq: int = 0) -> Snapshot:
    """Freeze what may be learned from now: consenting, whole answers with signals that stand.

    Parameters
    ----------
    redactor
        Takes personal data out of every text.
    after_seq
        Signals above this number count as new.
    """
    rows = session.execute(
        sa.select(Feedback, Episode)
        .join(Episode, Episode.id == Feedback.episode_id)
        .order_by(Episode.created_at, Episode.id, Feedback.seq)
    ).all()
    episodes = {episode.id: episode for _, episode in rows}
    standing = standing_of(signal for signal, _ in rows)
    set_aside = Counter({"superseded_or_withdrawn": len(rows) - len(standing)})
    by_episode: dict[str, list[Standing]] = {episode_id: [] for episode_id in episodes}
    for signal in standing:
        by_episode[signal.episode_id].append(signal)
    snapshot = Snapshot()
    for episode_id, signals in by_episode.items():
        reason = _reason_against(episodes[episode_id])
        if reason:
            set_aside[reason] += len(signals)
            continue
        used = [signal for signal in signals if signal.kind in TRAINED_KINDS]
        set_aside["kind_not_trained"] += len(signals) - len(used)
        if not used:
            continue
        example = _example(episodes[episode_id], used, redactor)
        set_aside.update({f"redacted_{what}": n for what, n in redactor.pop_counts().items()})
        if is_gate_prompt(example.messages):
            set_aside["prompt_kept_for_gates"] += len(example.feedback_ids)
            snapshot.gate.append(example)
        else:
            snapshot.train.append(example)
    snapshot.last_signal_seq = max((signal.seq for signal, _ in rows), default=0)
    snapshot.num_new_signals = sum(signal.seq > after_seq for signal, _ in rows)
    snapshot.set_aside = {reason: n for reason, n in sorted(set_aside.items()) if n}
    return snapshot


def _reason_against(episode: Episode) -> str | None:
    if not episode.learn:
        return "no_consent"
    if episode.status != "complete":
        return f"answer_{episode.status}"
    return None if episode.answer.strip() else "answer_empty"


def _example(episode: Episode, signals: list[Standing], redactor: Redactor) -> Example:
    return Example(
        episode_id=episode.id,
        messages=redactor.messages(episode.messages),
        answer=redactor.text(episode.answer),
        thumbs=[s.value for s in signals if s.kind == "thumb" and s.value is not None],
        corrections=[redactor.text(s.text) for s in signals if s.kind == "correction" and s.text],
        feedback_ids=[s.feedback_id for s in signals],
    )


def forgotten(session: Session, episode_ids: Collection[str]) -> set[str]:
    """Return which of the episodes are of users who were forgotten since."""
    query = sa.select(Episode.id).where(Episode.id.in_(episode_ids), Episode.user_id.startswith(TOMBSTONE))
    return set(session.scalars(query))
