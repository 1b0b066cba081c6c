"""Answers in a form that was asked for: any JSON, or JSON of a schema that is checked before the engine sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema
import orjson
from pydantic import AfterValidator, Field

from infra.parameters import OpenAIRequest
from infra.text import CleanText

MAX_SCHEMA_BYTES = 32_768
MAX_SCHEMA_DEPTH = 24


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema that the engine can be given.

    Raises
    ------
    ValueError
        It is none, it is too large or too deep, it refers to somewhere else, or a pattern in it is none.
    """
    try:
        size = len(orjson.dumps(schema))
    except TypeError as error:  # a number of more than 64 bits, which the engine could not be sent
        raise ValueError(f"The schema cannot be written: {error}.") from error
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"The schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken.")
    for key, value in _members(schema):
        if key in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#"):
            raise ValueError(f"A {key} must begin with #: nothing is fetched from elsewhere.")
        if key == "pattern" and isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"The pattern {value!r} is none: {error}.") from error
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "its root"
        raise ValueError(f"This is no JSON schema: at {where}, {error.message[:200]}.") from error
    return schema


def _members(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key of every object within, without recursion."""
    waiting: list[tuple[int, Any]] = [(1, schema)]
    while waiting:
        depth, value = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"The schema is nested more than {MAX_SCHEMA_DEPTH} deep.")
        if isinstance(value, dict):
            yield from value.items()
            waiting += [(depth + 1, each) for each in value.values()]
        elif isinstance(value, list):
            waiting += [(depth + 1, each) for each in value]


Schema = Annotated[dict[str, Any], AfterValidator(check_schema)]
FormatName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class JsonSchema(OpenAIRequest):
    """A schema with its name."""

    name: FormatName
    json_schema: Schema = Field(
        alias="schema", description="JSON Schema, draft 2020-12, without references elsewhere."
    )
    description: CleanText | None = Field(None, max_length=2000)
    strict: bool = Field(False, description="Taken; the answer fits the schema either way.")


class Plain(OpenAIRequest):
    """Text, in no form."""

    type: Literal["text"]


class AnyJson(OpenAIRequest):
    """A JSON object."""

    type: Literal["json_object"]


class ChatSchema(OpenAIRequest):
    """JSON of a schema, as chat completions ask for it."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ResponseSchema(JsonSchema):
    """JSON of a schema, as responses ask for it: in one object."""

    type: Literal["json_schema"]


ChatFormat = Annotated[Plain | AnyJson | ChatSchema, Field(discriminator="type")]
ResponseFormat = Annotated[Plain | AnyJson | ResponseSchema, Field(discriminator="type")]


def for_engine(form: Plain | AnyJson | ChatSchema | ResponseSchema | None) -> dict[str, Any] | None:
    """Return what the engine takes as ``response_format``; None for plain text."""
    if form is None or isinstance(form, Plain):
        return None
    if isinstance(form, AnyJson):
        return {"type": "json_object"}
    named = form.json_schema if isinstance(form, ChatSchema) else form
    assert isinstance(named, JsonSchema)
    return {"type": "json_schema", "json_schema": {"name": named.name, "schema": named.json_schema}}
