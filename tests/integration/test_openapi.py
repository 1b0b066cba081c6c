"""The whole OpenAPI document against the running API: whether a request fits it or not, it makes no 5xx."""

import json
import re

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.generation import GenerationMode

EXAMPLES = 20
SHORTENED = {
    "/v1/chat/completions": {"max_tokens": 4, "max_completion_tokens": None, "n": 1},
    "/v1/completions": {"max_tokens": 4, "n": 1},
    "/v1/responses": {"max_output_tokens": 4},
}
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def document(stack):
    return stack.http.get("/openapi.json").json()


def send_many(stack, operation, mode):
    """Send what the generator makes of one operation; return the status codes that came back."""
    seen = set()

    @SETTINGS
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        is_asked = operation.method.lower() == "post" and operation.path in SHORTENED
        if is_asked and mode is GenerationMode.POSITIVE:
            case.body |= SHORTENED[operation.path]  # what is tested is not the engine
        response = case.call(base_url=stack.settings.public_url, timeout=120, headers=stack.settings.credentials)
        seen.add(response.status_code)
        assert response.status_code < 500, (case.as_curl_command(), response.text[:500])
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["code"]

    try:
        send()
    except hypothesis.errors.Unsatisfiable:
        # Nothing can be wrong with a request that takes no parameters.
        assert mode is GenerationMode.NEGATIVE and not seen
    return seen


def test_no_request_names_an_address_to_be_fetched(document):
    """What the server fetches, the settings name: a request that could would reach what its sender cannot."""
    named = set()
    for methods in document["paths"].values():
        for operation in methods.values():
            named |= {parameter["name"] for parameter in operation.get("parameters", ())}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                named |= names_within(content["schema"], document["components"]["schemas"], set())
    assert len(named) > 30
    assert [name for name in named if re.search("ur[il]|host|address|callback|webhook", name, re.IGNORECASE)] == []


def names_within(schema, schemas, seen):
    """Return the names of all properties of a schema and what it refers to."""
    found = set(schema.get("properties", ()))
    parts = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    parts += [schema[name] for name in ("items", "additionalProperties") if isinstance(schema.get(name), dict)]
    if (reference := schema.get("$ref", "").rpartition("/")[2]) and reference not in seen:
        seen.add(reference)
        parts.append(schemas[reference])
    return found.union(*(names_within(part, schemas, seen) for part in parts))


def test_no_request_makes_a_server_error(stack, document):
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == sum(len(methods) for methods in document["paths"].values()) >= 12
    seen = {
        (operation.label, mode): send_many(stack, operation, mode)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    }
    # The generator reaches beyond what is refused at once.
    assert 200 in seen["PUT /v1/me/consent", GenerationMode.POSITIVE]
    assert 200 in seen["GET /v1/me/receipts", GenerationMode.POSITIVE]


def test_the_document_says_how_errors_look(document):
    text = json.dumps(document)
    assert "HTTPValidationError" not in text, "no request is answered by the framework's own 422"
    for methods in document["paths"].values():
        for operation in methods.values():
            schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorEnvelope")
