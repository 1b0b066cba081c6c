"""What a run's failure means to an operator, where the exception itself does not say."""

from __future__ import annotations

import errno

from infra.errors import EverloopError

DISK_FULL = "No space left on device"
NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's words, on the CPU and on a GPU


def explained(error: BaseException) -> EverloopError | None:
    """Return an error with a code and what to do, or None where the exception is no known kind of failure."""
    if isinstance(error, EverloopError):
        return error
    text = str(error)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or DISK_FULL in text:
        return EverloopError(
            "The disk is full. Free some space where the home is, and start the run again.",
            code="disk_full",
        )
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return EverloopError(
            "There is not enough memory: fewer micro_batch_rows or max_row_tokens need less.",
            code="out_of_memory",
        )
    return None
