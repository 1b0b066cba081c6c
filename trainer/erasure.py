"""This room's part of an erasure: the user's lines leave the datasets, and the runs that used them are marked."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy.registry import lock_out_erasures
from deploy.runs import TrainingRun
from infra.db import DATABASE_AWAY, Sessions
from infra.files import write_whole
from trainer import prepared
from trainer.collect import forgotten
from trainer.snapshot import episode_of

log = logging.getLogger("everloop.night")

ERASED_FILE = "erased_episodes.txt"
SWEPT_FILE = "swept"


def erase(session: Session, datasets_dir: Path, runs_dir: Path, episode_ids: Collection[str]) -> dict[str, Any]:
    """Take the episodes out of every stored dataset; mark and return the runs that held them.

    The datasets themselves are searched, so nothing depends on what was reported of them. The digest of a dataset
    stays that of what was trained on; the file then holds less. Safe to repeat, with the same result.
    """
    lock_out_erasures(session)  # two at once would write each other's lines back
    wanted = set(episode_ids)
    removed: Counter[str] = Counter()
    for path in _datasets(datasets_dir):
        removed[_digest_of(path)] += _without(path, wanted)
    removed = +removed
    of_them = TrainingRun.dataset_digest.in_(removed)
    session.execute(sa.update(TrainingRun).where(of_them).values(retrain_required=True))
    runs = session.scalars(sa.select(TrainingRun.id).where(of_them).order_by(TrainingRun.id)).all()
    for run_id in runs:  # rows quote the dataset; a killed run that needs them may not go on now
        prepared.forget(runs_dir / run_id)
    return {
        "runs_marked": list(runs),
        "dataset_lines_removed": removed.total(),
        "datasets": sorted(removed),
    }


def sweep(sessions: Sessions, datasets_dir: Path) -> None:
    """Take forgotten users out of datasets that were written after the erasure had looked at them.

    Call it under the lock of the training run: what a killed run had only begun to write goes altogether. Those
    that an earlier sweep saw are not read again. With the database away, or a full disk, it is left to the next
    night: the run that it ends must not fail for it.
    """
    swept = datasets_dir / SWEPT_FILE
    since_s = swept.stat().st_mtime if swept.exists() else 0.0
    try:
        with sessions.begin() as session:
            lock_out_erasures(session)
            for path in _datasets(datasets_dir):
                if path.stat().st_mtime < since_s:
                    continue
                ids = [episode_id for line in _lines(path) if (episode_id := episode_of(line)) is not None]
                if gone := forgotten(session, ids):
                    _without(path, gone)
            datasets_dir.mkdir(parents=True, exist_ok=True)
            swept.touch()  # before the lock goes: what an erasure looked at earlier was written earlier
        for unfinished in datasets_dir.glob(".*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    except (*DATABASE_AWAY, OSError):
        log.warning("the datasets could not be swept", exc_info=True)


def _datasets(datasets_dir: Path) -> list[Path]:
    """Return the files of all datasets, also of those that a killed run had only begun to write."""
    return sorted(datasets_dir.glob("*/dataset.*"))


def _digest_of(path: Path) -> str:
    return path.parent.name.lstrip(".").partition(".")[0]


def _lines(path: Path) -> list[str]:
    # Not splitlines: a text may hold other line ends (U+2028), which JSON lets stand.
    return [line for line in path.read_text().split("\n") if line]


def _without(path: Path, episode_ids: set[str]) -> int:
    """Rewrite a dataset without some episodes, whole or not at all; return how many went, now or before.

    A line that says no episode (of a file that was cut short) goes too: nobody could tell whose it is.
    """
    lines = _lines(path)
    gone = episode_ids.intersection(map(episode_of, lines))
    note = path.with_name(ERASED_FILE)
    before = set(note.read_text().split()) if note.exists() else set()
    if gone:
        # The ids first: a crash in between must not make the run look as if it had never held them.
        note.write_text("".join(f"{episode_id}\n" for episode_id in sorted(before | gone)))
        kept = [line for line in lines if episode_of(line) not in (None, *gone)]
        write_whole(path, "".join(f"{line}\n" for line in kept))
    return len((before | gone) & episode_ids)
