"""What a run trains on, once that is decided: kept beside its checkpoints, so that a killed run can go on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from deploy import head, registry
from deploy.runs import TrainingRun
from infra.errors import IntegrityError
from infra.files import write_whole
from infra.settings import Settings
from reward import store
from reward.encoders import open_active_encoder
from reward.tables import RewardSnapshot
from trainer import checkpoints, snapshot
from trainer.checkpoints import CHECKPOINTS_DIR, KEPT_DIR
from trainer.collect import forgotten
from trainer.policy import POLICY_DIR
from trainer.recipe import Rows
from trainer.scoring import PinnedReward
from trainer.snapshot import Snapshot

INPUTS_FILE = "inputs.json"
ROWS_FILE = "rows.jsonl"
ANSWERS_FILE = "answers.jsonl"
ADAPTER_DIR = "adapter"  # what the training ended with
OUTCOME_FILE = "trained.json"  # written when it has ended: what it came to, or why it came to nothing
MAX_RESUMES = 3  # what has killed a run more often would kill it again


@dataclass(slots=True)
class Prepared:
    """Data, reward and rows of a run.

    Attributes
    ----------
    champion
        The release that was served when the run began.
    start_from
        The release whose adapter it goes on from: the champion, or what is left of it without a forgotten user.
    """

    data: Snapshot
    reward: PinnedReward
    champion: str
    start_from: str
    snapshot_id: int
    rows: Rows = field(default_factory=Rows)

    def save(self, run_dir: Path) -> None:
        """Write what a later process needs, the inputs last."""
        rows = (
            json.dumps({"source": source, "row": row}, ensure_ascii=False)
            for source, row in zip(self.rows.sources, self.rows.rows, strict=True)
        )
        (run_dir / ROWS_FILE).write_text("".join(f"{line}\n" for line in rows))
        inputs = {
            "dataset_digest": self.data.digest,
            "champion": self.champion,
            "start_from": self.start_from,
            "reward_snapshot_id": self.snapshot_id,
            "pessimism_kappa": self.reward.kappa,
            "num_rows": len(self.rows.rows),
            "set_aside": dict(self.rows.set_aside),
        }
        write_whole(run_dir / INPUTS_FILE, json.dumps(inputs, indent=2) + "\n")


def remember(session: Session, reward: PinnedReward, data: Snapshot) -> None:
    """Have a reward take up the features of answers that the reward model met when they were rated."""
    digests = {
        store.answer_digest(example.messages, text)
        for example in data.gate  # all of which gold asks for; of the others few are ever scored
        for text in (example.answer, *example.corrections, *example.preferred_over)
    }
    reward.remember(store.cached_features(session, reward.encoder.name, digests))


def discard(run_dir: Path) -> None:
    """Remove what only a run needs that goes on: its rows quote people, and its weights learned from them."""
    (run_dir / ROWS_FILE).unlink(missing_ok=True)
    for name in (CHECKPOINTS_DIR, KEPT_DIR, POLICY_DIR, ADAPTER_DIR):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def forget(run_dir: Path) -> None:
    """Remove all that quotes people, or answers them; without its rows no run goes on."""
    (run_dir / ROWS_FILE).unlink(missing_ok=True)
    (run_dir / ANSWERS_FILE).unlink(missing_ok=True)


def load(session: Session, settings: Settings, run: TrainingRun, *, needs_checkpoint: bool = True) -> Prepared:
    """Return what an interrupted run trains on, where nothing that it rests on has changed.

    Parameters
    ----------
    needs_checkpoint
        Whether it must have come far enough to be worth going on with.

    Raises
    ------
    IntegrityError
        Code ``run_not_resumable``, with the reason.
    """
    run_dir = settings.runs_dir / run.id
    if needs_checkpoint and run.resumes >= MAX_RESUMES:
        raise _not_resumable(f"it died {run.resumes + 1} times")
    if needs_checkpoint and checkpoints.newest(run_dir / CHECKPOINTS_DIR) is None and outcome(run_dir) is None:
        raise _not_resumable("it has no whole checkpoint")
    try:
        inputs = json.loads((run_dir / INPUTS_FILE).read_text())
        lines = [json.loads(line) for line in (run_dir / ROWS_FILE).read_text().split("\n") if line]
        data = snapshot.read(settings.datasets_dir / inputs["dataset_digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # the last: rows of another version of Everloop
        raise _not_resumable("its rows are gone or cut short") from error
    if len(lines) != inputs["num_rows"]:
        raise _not_resumable("its rows are cut short")
    if forgotten(session, [example.episode_id for example in [*data.train, *data.gate]]):
        raise _not_resumable("it learned from a user who was forgotten meanwhile")
    champion, start_from = inputs["champion"], inputs["start_from"]
    if head.read(session).champion != champion or registry.clean_ancestor(session, champion) != start_from:
        raise _not_resumable("another release is served now")
    pinned = session.get(RewardSnapshot, inputs["reward_snapshot_id"])
    encoder = open_active_encoder(session, settings)
    if pinned is None or pinned.encoder != encoder.name:
        raise _not_resumable("the reward model has other features now")
    reward = PinnedReward(encoder, store.read_snapshot(pinned).head, inputs["pessimism_kappa"])
    remember(session, reward, data)
    rows = Rows([line["row"] for line in lines], [line["source"] for line in lines], Counter(inputs["set_aside"]))
    return Prepared(data, reward, champion, start_from, pinned.id, rows)


def outcome(run_dir: Path) -> dict[str, Any] | None:
    """Return what the training of a run came to, or None where it has not ended well."""
    path = run_dir / OUTCOME_FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if "adapter_dir" in found and Path(found["adapter_dir"]).is_dir() else None


def _not_resumable(reason: str) -> IntegrityError:
    return IntegrityError(f"The run cannot go on: {reason}.", code="run_not_resumable")
