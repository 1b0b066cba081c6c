"""The audit log: every act on a deployment, with who and why."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from deploy.tables import AuditEntry


def write(session: Session, *, actor: str, action: str, subject: str, reason: str, **details: Any) -> None:
    """Add a row within the caller's transaction."""
    session.add(AuditEntry(actor=actor, action=action, subject=subject, reason=reason, details=details))
