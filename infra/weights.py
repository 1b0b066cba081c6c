"""What a model's weights are called: digests over its safetensors files, without loading any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from infra.errors import SetupError

NOTE = "everloop.json"  # beside weights that were made or checked once: their digest
FileState = tuple[str, int, int]


def base_model_digest(model_dir: Path) -> str:
    """Return the SHA-256 over the model's weight files, as noted beside them, or computed if nobody did.

    Raises
    ------
    SetupError
        There are neither weights nor a note (code ``model_weights_missing``).
    """
    note = model_dir / NOTE
    if note.exists():
        return str(json.loads(note.read_text())["sha256"])
    states = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(model_dir))
    return _digest_of(states)


def weights_digest(model_dir: Path) -> str:
    """Return the SHA-256 over the digests of a directory's weight files (safetensors), in the order of their names.

    Raises
    ------
    SetupError
        There are none (code ``model_weights_missing``).
    """
    return files_digest(weight_files(model_dir))


def weight_files(model_dir: Path) -> list[Path]:
    """Return a model's weight files, by name.

    Raises
    ------
    SetupError
        There are none (code ``model_weights_missing``).
    """
    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise SetupError(
            f"{model_dir} holds no weights as safetensors. Name a model directory that does.",
            code="model_weights_missing",
        )
    return paths


def files_digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 over the SHA-256 digests of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _digest_of(states: tuple[FileState, ...]) -> str:
    # Asked at each load of an adapter; to read all weights of a large model takes a minute.
    return files_digest([Path(path) for path, _, _ in states])
