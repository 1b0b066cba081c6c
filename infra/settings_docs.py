"""Writes ``docs/settings.md`` from :class:`infra.settings.Settings`; a test keeps it so."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from infra.settings import DEFAULT_HOME, Settings

TYPE_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    dict: "JSON object",
}
INTRODUCTION = """\
# Settings

Made from `infra/settings.py` by `make docs`; a test keeps it so. A setting is read from its environment variable,
then from a file of the variable's name in small letters in the directory that `EVERLOOP_SECRETS_DIR` names (as
containers are given secrets), then from `everloop.toml` in the home (the name in the first column), then it has its
default.
Lists and objects are JSON in the environment: `EVERLOOP_CANARY_STEPS='[0.1, 0.5]'`. A name in `everloop.toml`
that is none of these is an error that names it; other `EVERLOOP_*` variables are passed over.

```toml
# everloop.toml
base_model = "/models/my-model"
night_cron = "30 2 * * 1-5"
time_zone = "Europe/Berlin"
```

An address that is set replaces the embedded part: `everloop up` does not start what somebody else runs.

| setting | environment | takes | default | meaning |
|---|---|---|---|---|
"""


def document(settings: type[Settings] = Settings) -> str:
    """Return ``docs/settings.md``."""
    return INTRODUCTION + "".join(_row(name, field) for name, field in settings.model_fields.items())


def undescribed(settings: type[Settings] = Settings) -> list[str]:
    """Return the settings whose meaning nobody wrote down."""
    return [name for name, field in settings.model_fields.items() if not (field.description or "").strip()]


def _row(name: str, field: FieldInfo) -> str:
    cells = (
        f"`{name}`",
        f"`EVERLOOP_{name.upper()}`",
        takes(field.annotation),
        _default(name, field),
        field.description,
    )
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def takes(annotation: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return takes(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(takes(kind) for kind in inner if kind is not type(None))
    if origin in (tuple, list):
        return f"list of {takes(inner[0])}"
    return TYPE_NAMES.get(origin or annotation, "") or str(getattr(annotation, "__name__", annotation))


def _default(name: str, field: FieldInfo) -> str:
    if name == "home":
        return f"`{DEFAULT_HOME}`"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "none: it must be set"
    if value is None:
        return "unset"
    return f"`{json.dumps(value) if isinstance(value, bool | tuple | dict) else value}`"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "settings.md").write_text(document())
