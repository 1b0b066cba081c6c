"""Writes the JSON Schema of every event, and ``docs/events.md`` from them; tests keep both so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.events import EVENTS, TOPICS


def write_schemas(directory: Path) -> None:
    """Write the JSON Schema of every event into `directory`."""
    for event in EVENTS:
        text = json.dumps(event.wire_schema(), indent=2, sort_keys=True) + "\n"
        (directory / f"{event.schema_name()}.json").write_text(text)


def document(schemas: Path) -> str:
    """Return ``docs/events.md``, made from the schemas in the repository."""
    lines = [
        "# Events",
        "",
        "Made from `infra/schemas/` by `python -m infra.event_docs`; a test keeps it so. Each value on Kafka is a "
        "CloudEvents 1.0",
        "envelope in JSON, and its `data` fits the schema that `dataschema` names. Fields marked *sealed* travel "
        "encrypted in",
        "`sealed` (a compact JWE under the key named by `subject`), so that destroying a person's key erases them "
        "everywhere.",
        "What happened within a trace names it in the envelope's `traceparent` (W3C), and",
        "Kafka's header of that name the hop that sent it.",
    ]
    for topic in TOPICS:
        lines += ["", f"## `{topic}`"]
        for event in (event for event in EVENTS if event.topic == topic):
            schema = json.loads((schemas / f"{event.schema_name()}.json").read_text())
            lines += ["", f"### `{event.schema_name()}`", "", schema["description"], ""]
            lines += ["| field | type | | what it is |", "|---|---|---|---|", *_rows(schema)]
    return "\n".join(lines) + "\n"


def _rows(schema: dict[str, Any], marks: tuple[str, ...] = ()) -> list[str]:
    rows = []
    for name, field in schema["properties"].items():
        mark = ", ".join([*marks, *(["required"] if name in schema.get("required", []) else [])])
        rows.append(f"| `{name}` | {_type_name(field)} | {mark} | {field.get('description', '')} |")
        if "contentSchema" in field:
            rows += _rows(field["contentSchema"], ("sealed",))
    return rows


def _type_name(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type_name(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_type_name(field['items'])}"
    return str(field.get("type", "any"))


if __name__ == "__main__":
    here = Path(__file__).parent
    write_schemas(here / "schemas")
    (here.parent / "docs" / "events.md").write_text(document(here / "schemas"))
