"""Each parameter that the official client can send is decided: taken, taken in part, or refused by name."""

from pathlib import Path
from typing import ClassVar

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.conversations import ConversationCreateParams, ItemCreateParams
from openai.types.responses import response_create_params
from pydantic import ValidationError

from agent import compatibility
from infra.parameters import Only, OpenAIRequest

PAGE = Path(__file__).parents[2] / "docs" / "api-compatibility.md"
OFFICIAL = {
    "POST /v1/chat/completions": chat_params.CompletionCreateParamsStreaming,
    "POST /v1/completions": completion_create_params.CompletionCreateParamsStreaming,
    "POST /v1/responses": response_create_params.ResponseCreateParamsStreaming,
    "POST /v1/conversations": ConversationCreateParams,
    "POST /v1/conversations/{id}/items": ItemCreateParams,
}
IN_THE_QUERY = {"POST /v1/conversations/{id}/items": {"include"}}


def names(typed_dict):
    found = set()
    for each in typed_dict.__mro__ if hasattr(typed_dict, "__mro__") else ():
        found |= set(getattr(each, "__annotations__", {}))
    return found


@pytest.mark.parametrize("route", OFFICIAL)
def test_each_parameter_of_the_official_client_is_decided(route):
    official = names(OFFICIAL[route]) - IN_THE_QUERY.get(route, set())
    assert official, "the package's types are elsewhere now"
    assert compatibility.decided(compatibility.ROUTES[route]) == official


@pytest.mark.parametrize("route", compatibility.ROUTES)
def test_no_parameter_is_decided_twice(route):
    model = compatibility.ROUTES[route]
    taken, only, refused = set(model.names()), set(model.only), set(model.refused)
    assert not taken & only and not taken & refused and not only & refused and model.own <= taken


def test_the_page_is_made_from_the_code():
    assert PAGE.read_text() == compatibility.document(), "run `make docs` after changing a parameter"


class Request(OpenAIRequest):
    only: ClassVar = {"tier": Only(("auto", True), "auto")}
    refused: ClassVar = {"audio": "text"}

    given: int = 0


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"audio": {}}, "unsupported_parameter", "audio"),
        ({"tier": "flex"}, "unsupported_parameter", "tier"),
        ({"tier": 1}, "unsupported_parameter", "tier"),
        ({"sound": 1}, "unknown_parameter", "sound"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(body, kind, param):
    with pytest.raises(ValidationError) as caught:
        Request.model_validate(body)
    (error,) = caught.value.errors()
    assert (error["type"], error["ctx"]["param"]) == (kind, param)


def test_null_and_what_changes_nothing_are_as_if_not_given():
    same = Request.model_validate({"tier": "auto", "audio": None, "given": None})
    assert same == Request.model_validate({"tier": True}) == Request()
