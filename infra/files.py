"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, after a crash too, finds the old text or the new one.

    One process at a time writes a path. What a crash leaves beside it, the next writing takes the place of.
    """
    staging = path.with_name(f".{path.name}")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it names
    staging.replace(path)
