"""Reading what comes off Kafka: anybody may have written it, so nothing is taken for granted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session

from infra import sealing
from infra.errors import EverloopError
from infra.events import BY_SCHEMA, SOURCE, ErasedEventError, Event
from infra.telemetry import tracing

MAX_EVENT_ID_CHARS = 200
_SCHEMA_NAME = re.compile(SOURCE + r":schema:[a-z_.]{1,60}\.v[0-9]{1,4}")


class UnreadableEventError(Exception):
    """The record is not an event of ours: not JSON, not of its schema, or of an unknown version."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A record whose envelope could be read."""

    event_id: str
    event_class: type[Event]
    content: dict[str, Any]


Headers = Sequence[tuple[str, bytes]]


def parse(value: bytes | None, headers: Headers = ()) -> Envelope:
    """Read a record's envelope; the trace that its headers name, whoever sent it last, goes before its own.

    Raises
    ------
    UnreadableEventError
        Where it has none, or names a schema that this version does not know.
    """
    try:
        content = orjson.loads(value or b"")
    except orjson.JSONDecodeError as error:
        raise UnreadableEventError(f"not JSON: {error.msg}") from None
    event_id = event_id_of(content)
    schema = str(content.get("dataschema"))
    event_class = BY_SCHEMA.get(schema)
    if event_class is None:
        # Quoted only where it looks like a name: anybody may have written it, with anything in it.
        raise UnreadableEventError(f"unknown schema {schema if _SCHEMA_NAME.fullmatch(schema) else ''}".rstrip())
    for name, text in headers:
        if name == tracing.HEADER:
            content[name] = text.decode(errors="replace")
    return Envelope(event_id, event_class, content)


def event_id_of(content: Any) -> str:
    """Return the id of a CloudEvent's content.

    Raises
    ------
    UnreadableEventError
        Where it has none that could be stored.
    """
    event_id = content.get("id") if isinstance(content, dict) else None
    if not isinstance(event_id, str) or not 0 < len(event_id) <= MAX_EVENT_ID_CHARS or "\x00" in event_id:
        raise UnreadableEventError("not a CloudEvent: it has no usable id")
    return event_id


def claim(session: Session, consumer: str, envelopes: Sequence[Envelope]) -> list[Envelope]:
    """Note the events as applied and return those that were not applied before, in their order."""
    inserted = session.scalars(_CLAIM, {"consumer": consumer, "event_ids": [e.event_id for e in envelopes]})
    fresh = set(inserted)
    first: dict[str, Envelope] = {}
    for envelope in envelopes:
        if envelope.event_id in fresh:
            first.setdefault(envelope.event_id, envelope)
    return list(first.values())


_CLAIM = sa.text(
    "INSERT INTO consumed_events (consumer, event_id) SELECT :consumer, * FROM unnest(CAST(:event_ids AS text[])) "
    "ON CONFLICT DO NOTHING RETURNING event_id"
)


def open_all(
    session: Session, envelopes: Sequence[Envelope], wanted: Collection[type[Event]], *, public: bool = False
) -> Iterator[tuple[Envelope, BaseModel]]:
    """Yield the events of the `wanted` classes.

    Parameters
    ----------
    public
        Read only what is not sealed. Otherwise sealed parts are opened, and what was erased is passed over.

    Raises
    ------
    UnreadableEventError
        Where an event does not fit its schema, or its sealed part does not open.
    """
    envelopes = [envelope for envelope in envelopes if envelope.event_class in wanted]
    subjects = [e.content["subject"] for e in envelopes if isinstance(e.content.get("subject"), str)]
    keys = {} if public else sealing.keys_of(session, subjects)
    for envelope in envelopes:
        try:
            if public:
                yield envelope, envelope.event_class.public_model().model_validate(envelope.content.get("data"))
            else:
                key = keys.get(str(envelope.content.get("subject")))
                yield envelope, envelope.event_class.from_cloudevent(envelope.content, key)
        except ErasedEventError:
            continue
        except ValidationError as error:
            where = [".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors(include_input=False)]
            raise UnreadableEventError(f"not of its schema: {'; '.join(where[:5])}") from None
        except EverloopError as error:
            raise UnreadableEventError(f"{error.message} [{error.code}]") from None
