"""The audit log: every act on a deployment, with who, what, when, why and from where, chained by hashes.

The database makes the chain and refuses to change or delete a row. Whoever gets around that changes a hash, and
with it all that follow, or takes rows off the end: the last hash, noted elsewhere, tells of that, too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from deploy.tables import AuditEntry
from infra.errors import IntegrityError

PLATFORM = "everloop/"  # how the names of actors begin that are no people
_ADDRESS = "audit address"
_BATCH_ROWS = 1000


def from_address(session: Session, address: str | None) -> None:
    """Say where the acts of this session come from, such as the address of an HTTP client."""
    session.info[_ADDRESS] = address


def write(session: Session, *, actor: str, action: str, subject: str, reason: str, **details: Any) -> AuditEntry:
    """Add a row within the caller's transaction.

    Until that ends no other is added, so do it after all that may wait for somebody else.
    """
    address = session.info.get(_ADDRESS)
    entry = AuditEntry(actor=actor, action=action, subject=subject, reason=reason, details=details, address=address)
    session.add(entry)
    return entry


def newest(
    session: Session,
    limit: int,
    *,
    before_id: int | None = None,
    automatic: bool | None = None,
    subject: str | None = None,
) -> list[AuditEntry]:
    """Return rows, the newest first.

    Parameters
    ----------
    before_id
        Only older ones than this.
    automatic
        True for what the platform did by itself, False for what people did.
    subject
        What it was done to, such as a release or a run.
    """
    query = sa.select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if before_id is not None:
        query = query.where(AuditEntry.id < before_id)
    if automatic is not None:
        by_platform = AuditEntry.actor.startswith(PLATFORM)
        query = query.where(by_platform if automatic else ~by_platform)
    if subject is not None:
        query = query.where(AuditEntry.subject == subject)
    return list(session.scalars(query))


def as_dict(entry: AuditEntry) -> dict[str, Any]:
    """Return an entry as it is shown."""
    names = ("id", "actor", "action", "subject", "reason", "address", "details", "hash")
    when = entry.created_at.isoformat(timespec="seconds")
    return {**{name: getattr(entry, name) for name in names}, "created_at": when}


@dataclass(frozen=True, slots=True)
class Verified:
    """A chain that holds."""

    entries: int
    last_hash: str


def verify(session: Session, expected: str | None = None) -> Verified:
    """Compute every hash anew.

    Parameters
    ----------
    expected
        A hash that was the last at some time: it must still be there.

    Raises
    ------
    IntegrityError
        Code ``audit_changed`` where a row is not what was written, ``audit_broken`` where rows are missing,
        ``audit_cut`` where the expected hash is gone.
    """
    details = sa.cast(AuditEntry.details, sa.Text)
    microseconds = sa.cast(sa.func.extract("epoch", AuditEntry.created_at) * 1_000_000, sa.BigInteger)
    columns = (
        *(AuditEntry.id, AuditEntry.actor, AuditEntry.action, AuditEntry.subject, AuditEntry.reason),
        *(AuditEntry.address, details, microseconds, AuditEntry.previous_hash, AuditEntry.hash),
    )
    rows = session.execute(sa.select(*columns).order_by(AuditEntry.id).execution_options(yield_per=_BATCH_ROWS))
    last, count, seen = "", 0, expected is None
    for number, *fields, previous, stored in rows:
        if previous != last:
            raise IntegrityError(f"Rows before entry {number} of the audit log are missing.", code="audit_broken")
        if _hash([number, *fields, previous]) != stored:
            raise IntegrityError(f"Entry {number} of the audit log was changed.", code="audit_changed")
        last, count, seen = stored, count + 1, seen or stored == expected
    if not seen:
        raise IntegrityError(f"No entry has the hash {expected}: the end was cut off.", code="audit_cut")
    return Verified(count, last)


def _hash(fields: list[Any]) -> str:
    texts = [None if field is None else str(field).encode() for field in fields]
    return hashlib.sha256(b"".join(b"-" if t is None else b"%d:%s" % (len(t), t) for t in texts)).hexdigest()
