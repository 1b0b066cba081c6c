"""Secrets that are shown once. What is stored is their digest: whoever reads the tables cannot use them."""

from __future__ import annotations

import hashlib
import secrets

KEY_PREFIX = "everloop_"  # by which scanners for leaked secrets know one


def new_token(prefix: str = "") -> str:
    """Return a secret with 256 random bits."""
    return prefix + secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    """Return what is stored of a secret; one with so many random bits needs no slow hash."""
    return hashlib.sha256(token.encode()).digest()
