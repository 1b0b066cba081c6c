"""The references in docs/ are made from the code: settings, OpenAPI, AsyncAPI."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import Field
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from agent import api_document
from infra import asyncapi, settings_docs
from infra.events import BY_SCHEMA, EVENTS, TOPICS
from infra.sealing import SubjectKey
from infra.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ASYNCAPI_SCHEMA = (
    ROOT / "infra" / "web" / "node_modules" / "@asyncapi" / "specs" / "schemas" / "3.0.0-without-$id.json"
)
RUN = "run `make docs` after changing"


def test_the_page_on_settings_is_made_from_the_settings():
    assert (DOCS / "settings.md").read_text() == settings_docs.document(), f"{RUN} a setting"


def test_every_setting_says_what_it_means():
    assert settings_docs.undescribed() == []


class WithOneMore(Settings):
    silent: int = 3
    steps: tuple[float, ...] = Field((0.5,), description="One | two.")


def test_a_setting_without_a_meaning_is_found():
    assert settings_docs.undescribed(WithOneMore) == ["silent"]
    row = settings_docs.document(WithOneMore).splitlines()[-1]
    assert row == "| `steps` | `EVERLOOP_STEPS` | list of number | `[0.5]` | One \\| two. |"


def test_the_openapi_document_is_that_of_the_api():
    assert (DOCS / "openapi.json").read_text() == api_document.document(), f"{RUN} a route"


def test_the_openapi_document_names_every_operation_and_its_errors():
    document = json.loads((DOCS / "openapi.json").read_text())
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), f"{method} {path} has no summary"
            assert "4XX" in operation["responses"], f"{method} {path} does not say how it refuses"


def test_the_asyncapi_document_is_made_from_the_events():
    assert (DOCS / "asyncapi.yaml").read_text() == asyncapi.text(), f"{RUN} an event"


def test_the_asyncapi_document_fits_its_specification():
    if not ASYNCAPI_SCHEMA.exists():
        pytest.skip("the schema of AsyncAPI is not there; `make setup` installs it with the pages' libraries")
    validator = jsonschema.Draft7Validator(json.loads(ASYNCAPI_SCHEMA.read_text()))
    document = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
    assert list(validator.iter_errors(document)) == []
    document["channels"][TOPICS[0]]["adress"] = "a slip"
    assert not validator.is_valid(document)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_each_message_describes_what_travels(event):
    """The document's schema takes the event that the code makes, and no other event."""
    document = asyncapi.document()
    assert event.schema_name() in document["channels"][event.topic]["messages"]
    payload = document["components"]["messages"][event.schema_name()]["payload"]
    registry = Registry(retrieve=_read).with_resource("urn:docs/", _resource(document))
    validator = jsonschema.Draft202012Validator({"$id": "urn:docs/", **document, **payload}, registry=registry)
    key = SubjectKey("sk_1", bytes(32)) if event.personal else None
    wire = event.model_construct(**_example(event)).to_cloudevent("ev_1", key)
    validator.validate(wire)
    assert BY_SCHEMA[wire["dataschema"]] is event
    assert not validator.is_valid({**wire, "dataschema": "urn:everloop:schema:other.v1"})
    assert not validator.is_valid({**wire, "data": {}})


def _resource(contents):
    return DRAFT202012.create_resource(contents)


def _read(uri):
    return _resource(json.loads((ROOT / "infra" / "schemas" / uri.rpartition("/")[2]).read_text()))


def _example(event):
    """Return values that fit the fields, told by their types in the schema."""
    schema = event.model_json_schema()
    values = {"string": "x", "integer": 1, "number": 0.5, "boolean": True, "array": [], "null": None}

    def of(field):
        if "default" in field:
            return field["default"]
        if "enum" in field:
            return field["enum"][0]
        return values[field["type"]] if "type" in field else of(field["anyOf"][-1])

    return {name: of(field) for name, field in schema["properties"].items()}
