"""Which of the processes that train together this is; one that trains alone is the main one of one."""

from __future__ import annotations

import os


def num_processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this is the one that writes files and tells of progress."""
    return os.environ.get("RANK", "0") == "0"
