"""Checkpoints that are known to be whole: each is sealed with the digests of its files, last of all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from infra.files import write_whole

log = logging.getLogger("everloop.training")

CHECKPOINTS_DIR = "checkpoints"
KEPT_DIR = "kept"  # adapters at some steps, to choose from after the training
SEAL_FILE = "everloop-seal.json"


def seal(directory: Path) -> None:
    """Seal a checkpoint, whole or not at all."""
    write_whole(directory / SEAL_FILE, json.dumps(_digests(directory), indent=2))


def newest(checkpoints_dir: Path) -> Path | None:
    """Return the newest whole checkpoint; those that are not whole are removed, and said so in the log."""
    found = sorted(checkpoints_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for directory in reversed(found):
        if is_whole(directory):
            return directory
        log.warning("%s is not whole and is left out", directory.name)
        shutil.rmtree(directory, ignore_errors=True)
    return None


def is_whole(directory: Path) -> bool:
    """Tell whether a checkpoint was sealed and is as it was then."""
    try:
        sealed = json.loads((directory / SEAL_FILE).read_text())
    except (OSError, ValueError):
        return False
    return bool(sealed) and sealed == _digests(directory)


def _digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(SEAL_FILE))
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}
