"""What a tool is, whoever brings it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import orjson
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from agent.tools.levels import BUILT_IN
from infra.db import Sessions

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")  # OpenAI's rule
MAX_DESCRIPTION_CHARS = 1024
MAX_SCHEMA_BYTES = 16_384


class ToolError(Exception):
    """A call failed; the message is for the model, which may try otherwise."""


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom a tool is called, and what it may look into."""

    user: str
    sessions: Sessions


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may have called.

    Parameters
    ----------
    name
        As the model calls it: letters, digits, ``_`` and ``-``, at most 64.
    description
        When to use it, in a sentence.
    parameters
        JSON Schema of its arguments, an object's.
    run
        Does it, for a caller, with arguments that fit the schema; returns text, or what becomes JSON.

    Raises
    ------
    ValueError
        For a name or a schema that is not one.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[Caller, dict[str, Any]], Awaitable[Any]]
    source: str = BUILT_IN
    _validator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise ValueError(f"{self.name!r} is no name of a tool: letters, digits, _ and -, at most 64.")
        object.__setattr__(self, "_validator", validator(self.parameters))

    def complaint(self, arguments: Any) -> str | None:
        """Return why arguments do not fit the schema, in a sentence for the model; None where they do."""
        if not isinstance(arguments, dict):
            return "The arguments must be a JSON object."
        try:
            error = next(self._validator.iter_errors(arguments), None)
        except Unresolvable:
            return "The tool's schema points to what is not in it; it cannot be called."
        except (RecursionError, re.error):
            return "The tool's schema cannot be checked; it cannot be called."
        if error is None:
            return None
        where = "/".join(str(part) for part in error.absolute_path)
        return f"{where + ': ' if where else ''}{error.message[:300]}"

    def function(self) -> dict[str, Any]:
        """Return it as OpenAI describes functions."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


def validator(schema: Any) -> Any:
    """Return what checks arguments against a schema; it fetches nothing that the schema points to.

    Raises
    ------
    ValueError
        Where it is no JSON Schema of an object, or too long to be shown to a model.
    """
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError("The parameters must be a JSON Schema of an object.")
    try:
        size = len(orjson.dumps(schema))
    except TypeError as error:  # a number of more than 64 bits, or nested too deeply to be sent to the engine
        raise ValueError(f"The schema cannot be written: {error}.") from None
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"The schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken.")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        raise ValueError(f"No JSON Schema: {getattr(error, 'message', 'nested too deeply')[:200]}") from None
    return jsonschema.Draft202012Validator(schema, registry=Registry())
