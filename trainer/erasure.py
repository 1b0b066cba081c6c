"""This room's part of an erasure: the user's lines leave the datasets, and the runs that used them are marked."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trainer.snapshot import DATASET_FILE, forgotten
from trainer.tables import TrainingRun

ERASED_FILE = "erased_episodes.txt"


def erase(session: Session, runs_dir: Path, episode_ids: Collection[str]) -> dict[str, Any]:
    """Take the episodes out of every stored dataset; mark and return the runs that held them.

    The datasets themselves are searched, so nothing depends on what was reported of them. The digest of a dataset
    stays that of what was trained on; the file then holds less. Safe to repeat, with the same result.
    """
    wanted = set(episode_ids)
    removed = {
        path.parent.name: count
        for path in sorted(runs_dir.glob(f"*/{DATASET_FILE}"))
        if (count := _without(path, wanted))
    }
    session.execute(sa.update(TrainingRun).where(TrainingRun.id.in_(removed)).values(retrain_required=True))
    digests = session.scalars(
        sa.select(TrainingRun.dataset_digest).where(TrainingRun.id.in_(removed)).order_by(TrainingRun.id)
    )
    return {
        "runs_marked": sorted(removed),
        "dataset_lines_removed": sum(removed.values()),
        "datasets": list(digests),
    }


def sweep(session: Session, runs_dir: Path) -> None:
    """Take forgotten users out of datasets that were written after the erasure had looked at them."""
    for path in sorted(runs_dir.glob(f"*/{DATASET_FILE}")):
        ids = [json.loads(line)["episode_id"] for line in path.read_text().splitlines()]
        if gone := forgotten(session, ids):
            _without(path, gone)


def _without(path: Path, episode_ids: set[str]) -> int:
    """Rewrite a dataset without some episodes, whole or not at all; return how many went, now or before."""
    lines = path.read_text().splitlines()
    gone = {episode_id for line in lines if (episode_id := json.loads(line)["episode_id"]) in episode_ids}
    note = path.with_name(ERASED_FILE)
    before = set(note.read_text().split()) if note.exists() else set()
    if gone:
        # The ids first: a crash in between must not make the run look as if it had never held them.
        note.write_text("".join(f"{episode_id}\n" for episode_id in sorted(before | gone)))
        staging = path.with_suffix(".new")
        staging.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["episode_id"] not in gone))
        staging.replace(path)
    return len((before | gone) & episode_ids)
