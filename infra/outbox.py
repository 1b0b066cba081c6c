"""The outbox: an event is written in the transaction of the change that it reports."""

from __future__ import annotations

from sqlalchemy.orm import Session

from infra.events import Event
from infra.tables import OutboxRow


def append(session: Session, event: Event, *, key: str) -> str:
    """Add `event` to the outbox within the caller's transaction.

    Parameters
    ----------
    key
        Kafka key; events of one key keep their order.

    Returns
    -------
    str
        The event's id.
    """
    envelope = event.to_cloudevent()
    session.add(OutboxRow(event_id=envelope["id"], topic=event.topic, key=key, event=envelope))
    return str(envelope["id"])
