"""Sealing: what a person said travels encrypted under a key of their own, so that destroying the key erases it.

The outbox only grows and Kafka cannot be edited. What is written there about a person is a compact JWE (RFC 7516,
``dir`` with ``A256GCM``) under that person's key; any JOSE library can open it with the key. Once the key is
destroyed, nobody can, wherever copies lie.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy.orm import Session

from infra.errors import IntegrityError
from infra.ids import new_id
from infra.tables import SubjectKeyRow

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class SubjectKey:
    """The key of one person, under an id that says nothing about them."""

    key_id: str
    key: bytes


def seal(key: SubjectKey, fields: dict[str, Any]) -> str:
    """Encrypt `fields` into a compact JWE."""
    header = _b64(orjson.dumps({"alg": "dir", "enc": "A256GCM", "kid": key.key_id}))
    nonce = secrets.token_bytes(NONCE_BYTES)
    sealed = AESGCM(key.key).encrypt(nonce, orjson.dumps(fields), header.encode())
    return f"{header}..{_b64(nonce)}.{_b64(sealed[:-TAG_BYTES])}.{_b64(sealed[-TAG_BYTES:])}"


def unseal(key: bytes, token: str) -> dict[str, Any]:
    """Decrypt what :func:`seal` made.

    Raises
    ------
    IntegrityError
        Code ``seal_broken``: the token was altered, or sealed with another key.
    """
    try:
        header, _, nonce, ciphertext, tag = token.split(".")
        clear = AESGCM(key).decrypt(_unb64(nonce), _unb64(ciphertext) + _unb64(tag), header.encode())
        return dict(orjson.loads(clear))
    except (ValueError, InvalidTag) as error:
        raise IntegrityError("A sealed part does not open with its key.", code="seal_broken") from error


def create_keys(session: Session, num_keys: int) -> list[str]:
    """Make keys within the caller's transaction and return their ids."""
    rows = [{"key_id": new_id("sk"), "key": secrets.token_bytes(KEY_BYTES)} for _ in range(num_keys)]
    session.execute(sa.insert(SubjectKeyRow), rows)
    return [str(row["key_id"]) for row in rows]


def keys_of(session: Session, key_ids: Iterable[str]) -> dict[str, bytes]:
    """Return the keys that still exist; a destroyed one is missing."""
    wanted = list(set(key_ids))
    if not wanted:
        return {}
    rows = session.execute(
        sa.select(SubjectKeyRow.key_id, SubjectKeyRow.key).where(
            SubjectKeyRow.key_id.in_(wanted), SubjectKeyRow.key.is_not(None)
        )
    )
    return {key_id: key for key_id, key in rows if key is not None}


def destroy(session: Session, key_ids: Sequence[str]) -> None:
    """Destroy keys; what they sealed is gone, wherever it lies."""
    session.execute(
        sa.update(SubjectKeyRow)
        .where(SubjectKeyRow.key_id.in_(key_ids))
        .values(key=None, destroyed_at=sa.func.now())
    )


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
