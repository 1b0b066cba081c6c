"""What a backup leaves out of the settings, and adapters that it takes from an object store."""

import uuid

import pytest

from deploy.adapter_files import adapter_digest, file_digests
from deploy.store import open_store
from flows.backup.restoring import _put_adapters
from flows.backup.taking import _copy_adapters, is_secret
from infra.settings import Settings
from tests.adapters import make_adapter


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("adapters_options", {"key": "a"}, True),
        ("oidc_client_secret", "s", True),
        ("metrics_token", "t", True),
        ("session_key", "k", True),
        ("database_url", "postgresql+psycopg://me:mine@db/everloop", True),
        ("prefect_url", "https://me:mine@prefect/api", True),
        ("prefect_auth", "me:mine", True),
        ("database_url", "postgresql+psycopg://me@db/everloop", False),
        ("engine_replicas", ["http://one:8000", "http://two:8000"], False),
        ("max_answer_tokens", 200, False),
        ("adapters_url", "s3://bucket/prefix", False),
        ("quiet_hours", ["08:00-20:00"], False),
    ],
)
def test_what_holds_a_secret_is_left_out(name, value, secret):
    assert is_secret(name, value) is secret


def test_adapters_go_from_one_store_to_another(tmp_path):
    buckets = [f"memory://backup-{uuid.uuid4().hex}/adapters" for _ in range(2)]
    old, new = (Settings(home=tmp_path / name, adapters_url=url) for name, url in zip("on", buckets, strict=True))
    store = open_store(old)
    with store.staged(make_adapter(tmp_path / "made")) as staged:
        digest = adapter_digest(file_digests(staged))
        store.put(staged, digest, {"recipe": "dpo"})
    store.annotate(digest, "README.md", "its card")
    absent = "0" * 64
    assert _copy_adapters(old, [digest, absent], tmp_path / "backup") == [absent]
    assert _put_adapters(new, tmp_path / "backup") == 1
    assert adapter_digest(file_digests(open_store(new).fetch(digest))) == digest
    assert open_store(new).digests() == {digest}
