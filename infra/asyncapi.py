"""Writes ``docs/asyncapi.yaml``, the AsyncAPI 3 document of the events on Kafka; a test keeps it so."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from infra.events import EVENTS, SOURCE, TOPICS, Event, dead_letter_topic

SCHEMAS = "../infra/schemas"  # as seen from docs/
COPY_HEADERS = {
    "consumer": "Which consumer gave it up.",
    "reason": "Why; quotes nothing that a person said.",
    "place": "Partition and offset of the original.",
    "left_out_bytes": "Size of a value that was too large to be copied; the copy has none then.",
}


def document() -> dict[str, Any]:
    """Return the document as plain data."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Everloop's events",
            "version": version("everloop"),
            "license": {"name": "Apache-2.0"},
            "description": "Made from infra/events.py by `make docs`. Values are CloudEvents 1.0 in JSON. What a "
            "person said, and who they are, is sealed under a key of their own.",
        },
        "defaultContentType": "application/json",
        "channels": {
            address: channel(address) for topic in TOPICS for address in (topic, dead_letter_topic(topic))
        },
        "operations": {
            topic: {
                "action": "send",
                "channel": {"$ref": f"#/channels/{topic}"},
                "summary": "The relay publishes what the outbox holds, in its order, each event at least once: a "
                "consumer knows one that it has seen by `id`.",
            }
            for topic in TOPICS
        },
        "components": {
            "messages": {event.schema_name(): message(event) for event in EVENTS},
            "schemas": {"envelope": envelope()},
        },
    }


def channel(address: str) -> dict[str, Any]:
    """Return a topic with the events on it; a dead-letter topic has copies of those of its own topic."""
    topic = address.removesuffix(dead_letter_topic(""))
    described: dict[str, Any] = {
        "address": address,
        "messages": {
            event.schema_name(): {"$ref": f"#/components/messages/{event.schema_name()}"}
            for event in EVENTS
            if event.topic == topic
        },
    }
    if topic != address:
        headers = " ".join(f"`{name}`: {meaning}" for name, meaning in COPY_HEADERS.items())
        described["description"] = f"Copies of what a consumer gave up, with Kafka headers: {headers}"
    return described


def message(event: type[Event]) -> dict[str, Any]:
    """Return an event: the envelope, with the type, the schema's name and the data of this one."""
    name = event.schema_name()
    this: dict[str, Any] = {
        "type": {"const": f"dev.everloop.{event.type}"},
        "dataschema": {"const": f"{SOURCE}:schema:{name}"},
        "data": {"$ref": f"{SCHEMAS}/{name}.json"},
    }
    required = ["subject"] if event.personal else []
    return {
        "name": name,
        "title": event.__name__,
        "summary": (event.__doc__ or "").strip().splitlines()[0],
        "contentType": "application/json",
        "payload": {
            "allOf": [{"$ref": "#/components/schemas/envelope"}, {"properties": this, "required": required}],
        },
    }


def envelope() -> dict[str, Any]:
    """Return the JSON Schema of the CloudEvents 1.0 envelope."""
    text = {"type": "string", "minLength": 1}
    return {
        "type": "object",
        "required": ["specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "data"],
        "properties": {
            "specversion": {"const": "1.0"},
            "id": {**text, "description": "The event's identity, by which a second delivery is known."},
            "source": {"const": SOURCE},
            "type": text,
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"const": "application/json"},
            "dataschema": {**text, "description": "Names the versioned schema of `data`."},
            "subject": {**text, "description": "The key that `data.sealed` is sealed under."},
            "data": {"type": "object"},
        },
    }


def text() -> str:
    """Return the document as YAML."""
    head = "# Made by `make docs`; change infra/events.py or infra/asyncapi.py instead.\n"
    return head + str(yaml.safe_dump(document(), sort_keys=False, allow_unicode=True, width=110))


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "asyncapi.yaml").write_text(text())
