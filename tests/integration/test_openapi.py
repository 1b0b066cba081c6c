"""The whole OpenAPI document against the running API: whether a request fits it or not, it makes no 5xx."""

import json

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.generation import GenerationMode

EXAMPLES = 20
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


def test_no_request_makes_a_server_error(stack, document):
    tried = {}
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            tried[operation.label, mode] = set()

            @SETTINGS
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def send(case, seen=tried[operation.label, mode]):
                response = case.call(base_url=stack.settings.public_url, timeout=120)
                seen.add(response.status_code)
                assert response.status_code < 500, (case.as_curl_command(), response.text[:500])
                if response.status_code >= 400:
                    error = response.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"} and error["code"]

            send()
    labels = {label for label, _ in tried}
    assert len(labels) == sum(len(methods) for methods in document["paths"].values()) >= 12
    # The generator reaches beyond what is refused at once.
    assert 200 in tried["PUT /v1/me/consent", GenerationMode.POSITIVE]
    assert 200 in tried["GET /v1/me/receipts", GenerationMode.POSITIVE]


def test_the_document_says_how_errors_look(document):
    text = json.dumps(document)
    assert "HTTPValidationError" not in text, "no request is answered by the framework's own 422"
    for methods in document["paths"].values():
        for operation in methods.values():
            schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorEnvelope")
