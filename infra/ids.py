"""Ids that sort by the time at which they were made (UUID version 7, RFC 9562)."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

_RANDOM_BITS = 74


def new_id(prefix: str, at: datetime | None = None) -> str:
    """Return ``prefix_`` and 32 hexadecimal digits; 74 of the bits are random, so it cannot be guessed.

    Parameters
    ----------
    at
        The time that the id carries; now, if unset.
    """
    unix_ms = time.time_ns() // 1_000_000 if at is None else int(at.timestamp() * 1000)
    noise = secrets.randbits(_RANDOM_BITS)
    value = unix_ms << 80 | 0x7 << 76 | (noise >> 62) << 64 | 0b10 << 62 | noise & (1 << 62) - 1
    return f"{prefix}_{value:032x}"


def first_id(prefix: str, at: datetime) -> str:
    """Return the lower bound of all ids made at or after `at`; what ranges of ids are cut by."""
    return f"{prefix}_{int(at.timestamp() * 1000):012x}"


def time_of(identity: str) -> datetime:
    """Return the time that an id carries, to the millisecond."""
    return datetime.fromtimestamp(int(identity.partition("_")[2][:12], 16) / 1000, UTC)
