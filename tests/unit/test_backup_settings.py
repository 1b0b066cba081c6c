"""Which settings a backup leaves out, as whoever finds it may not read them."""

import pytest

from flows.backup.taking import is_secret


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("adapters_options", {"key": "a"}, True),
        ("oidc_client_secret", "s", True),
        ("metrics_token", "t", True),
        ("session_key", "k", True),
        ("database_url", "postgresql+psycopg://me:mine@db/everloop", True),
        ("prefect_url", "https://me:mine@prefect/api", True),
        ("database_url", "postgresql+psycopg://me@db/everloop", False),
        ("engine_replicas", ["http://one:8000", "http://two:8000"], False),
        ("max_answer_tokens", 200, False),
        ("adapters_url", "s3://bucket/prefix", False),
        ("quiet_hours", ["08:00-20:00"], False),
    ],
)
def test_what_holds_a_secret_is_left_out(name, value, secret):
    assert is_secret(name, value) is secret
