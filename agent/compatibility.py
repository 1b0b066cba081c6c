"""``docs/api-compatibility.md``: what becomes of each parameter of OpenAI's API, as the code decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.completions import CompletionRequest
from agent.responses.schema import ResponseRequest
from agent.schema import ChatRequest
from feedback.conversations_api import NewConversation, NewItems
from infra.parameters import OpenAIRequest

PAGE = Path(__file__).parents[1] / "docs" / "api-compatibility.md"
ROUTES: dict[str, type[OpenAIRequest]] = {
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/responses": ResponseRequest,
    "POST /v1/conversations": NewConversation,
    "POST /v1/conversations/{id}/items": NewItems,
}
INTRODUCTION = """# OpenAI's API, parameter by parameter

Made from the code by `make docs`; a test compares it with the types of the `openai` package, so that a parameter
which a new version brings fails the test until somebody has decided on it. [assistant-api.md](assistant-api.md)
says how the routes are meant to be used.

*Taken* is a parameter that does what it says. One that is taken in some values only does nothing in these, and is
refused in others. *Refused* is an error 400 of code `unsupported_parameter`, whose `param` is the name; a name
that OpenAI's API does not have is one of code `unknown_parameter`. `null` is as if not given. What is taken and
has a value that it cannot have is an error 400 of code `invalid_request`, with `param`.
"""


def document() -> str:
    """Return the page."""
    return INTRODUCTION + "".join(_table(route, model) for route, model in ROUTES.items())


def decided(model: type[OpenAIRequest]) -> set[str]:
    """Return the parameters of OpenAI's that a request takes, takes in part, or refuses by name."""
    return set(model.names() | model.only.keys() | model.refused.keys()) - model.own


def _table(route: str, model: type[OpenAIRequest]) -> str:
    rows = {}
    for name, field in model.model_fields.items():
        called = field.alias or name
        rows[called] = "ours" if called in model.own else "taken", field.description or ""
    for name, only in model.only.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in only.values)
        rows[name] = f"only {values}", only.instead
    rows |= {name: ("refused", instead) for name, instead in model.refused.items()}
    lines = [_row(name, *rows[name]) for name in sorted(rows)]
    return f"\n## {route}\n\n| parameter | | |\n|---|---|---|\n" + "".join(lines)


def _row(name: str, *cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in (f"`{name}`", *cells)) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(document())
