"""Dataset snapshots: what a run may learn from, frozen, and kept under the digest of its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra.errors import IntegrityError
from infra.files import write_whole
from reward.style import num_words
from trainer import data_card

DATASET_FILE = "dataset.jsonl"
CARD_FILE = "card.json"
CARD_PAGE = "README.md"

Split = Literal["train", "gate"]
ANY_LENGTH = (0, 1_000_000)  # words


@dataclass(frozen=True, slots=True)
class Example:
    """An answer that people said something of.

    Attributes
    ----------
    conversation
        Digest of how the conversation began: its episodes are never split.
    verdicts
        What people said of the answer, 0 (bad) to 1 (good): thumbs and ratings.
    corrections
        How people would have had it.
    preferred_over
        Answers to the same messages that it was preferred to.
    feedback_ids
        The signals that all this is taken from.
    """

    episode_id: str
    conversation: str
    messages: list[dict[str, Any]]
    answer: str
    verdicts: list[float] = field(default_factory=list)
    corrections: list[str] = field(default_factory=list)
    preferred_over: list[str] = field(default_factory=list)
    feedback_ids: list[str] = field(default_factory=list)

    @property
    def balance(self) -> float:
        """Good minus bad verdicts, from -n to n."""
        return sum(2.0 * verdict - 1.0 for verdict in self.verdicts)


@dataclass(slots=True)
class Snapshot:
    """The frozen data of one run.

    Attributes
    ----------
    set_aside
        What is not in it, counted by reason.
    last_signal_seq
        The range: signals up to this number were looked at.
    num_new_signals
        Those above the number that was asked for.
    num_users
        People whose answers train.
    """

    train: list[Example] = field(default_factory=list)
    gate: list[Example] = field(default_factory=list)
    set_aside: dict[str, int] = field(default_factory=dict)
    last_signal_seq: int = 0
    num_new_signals: int = 0
    num_users: int = 0

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

    def save(self, datasets_dir: Path) -> Path:
        """Write lines and card under the digest, whole or not at all; return the directory.

        Lines that are there already stay as they are: they are the same, or somebody was erased from them since.
        The card tells of the newest range that came to these lines.
        """
        target = datasets_dir / self.digest
        if target.exists():
            self._write_card(target)
            return target
        staging = datasets_dir / f".{self.digest}.{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self._write_card(staging)
        write_whole(staging / DATASET_FILE, self.to_jsonl())
        staging.rename(target)
        return target

    def _write_card(self, directory: Path) -> None:
        card = data_card.card_of(self)
        write_whole(directory / CARD_FILE, json.dumps(card, indent=2) + "\n")
        write_whole(directory / CARD_PAGE, data_card.page_of(card))

    def well_rated_words(self, tail: float = 0.05) -> tuple[int, int]:
        """Return the range of lengths (words) that people rated well or wrote themselves.

        Training may move the length within it, and not beyond: what a reward allows, a policy takes.

        Parameters
        ----------
        tail
            Part of the answers left out at either end.
        """
        words = sorted(
            [num_words(e.answer) for e in self.train if e.balance > 0 or e.preferred_over]
            + [num_words(text) for e in self.train for text in e.corrections]
        )
        if not words:
            return ANY_LENGTH
        cut = int(len(words) * tail)
        return words[cut], words[-1 - cut]


def read(dataset_dir: Path) -> Snapshot:
    """Return a snapshot that was saved, after checking its bytes against the digest in its name.

    Raises
    ------
    IntegrityError
        Code ``dataset_corrupt``: altered, cut short, or somebody was erased from it since.
    """
    raw = (dataset_dir / DATASET_FILE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != dataset_dir.name:
        raise IntegrityError(
            f"The dataset {dataset_dir.name[:12]} is not what its digest names: it was altered, or a user was "
            "erased from it. Take a new snapshot.",
            code="dataset_corrupt",
        )
    found = Snapshot()
    for line in raw.decode().split("\n"):  # not splitlines: a text may hold U+2028
        if line:
            row = json.loads(line)
            (found.train if row.pop("split") == "train" else found.gate).append(Example(**row))
    card = json.loads((dataset_dir / CARD_FILE).read_text())
    found.set_aside, found.last_signal_seq = card["set_aside"], card["last_signal_seq"]
    found.num_users = card["users"]
    return found


def episode_of(line: str) -> str | None:
    """Return the episode that a line of a dataset is about; None for what is no such line."""
    try:
        return str(json.loads(line)["episode_id"])
    except (ValueError, KeyError, TypeError):
        return None
