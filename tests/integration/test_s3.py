"""Adapters in S3, on a server of its own: moto's, which keeps what it was given while it is away."""

import json
import shutil

import fsspec
import pytest

from deploy import registry
from deploy.adapter_files import ADAPTER_FILES, adapter_digest, file_digests
from deploy.bucket import BucketStore
from deploy.store import MANIFEST, open_store
from flows.backup.restoring import restore
from flows.backup.taking import take
from infra.errors import IntegrityError, UnavailableError
from infra.settings import Settings
from tests.adapters import make_adapter, make_base

MISSING = "S3 is tested after .venv/bin/pip install --no-deps -r infra/requirements/s3.txt"
SECRET = "a-secret-that-nobody-sees"


class Server:
    """An S3 server that can go away and come back."""

    def __init__(self):
        pytest.importorskip("s3fs", reason=MISSING)
        self._moto = pytest.importorskip("moto.server", reason=MISSING)
        self._port = 0
        self.start()

    def start(self):
        self._running = self._moto.ThreadedMotoServer(port=self._port)
        self._running.start()
        host, self._port = self._running.get_host_and_port()
        self.url = f"http://{host}:{self._port}"

    def stop(self):
        self._running.stop()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def settings(server, tmp_path):
    options = {
        "key": "key",
        "secret": SECRET,
        "client_kwargs": {"endpoint_url": server.url, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1},
    }
    fs = fsspec.filesystem("s3", **options)
    fs.call_s3("create_bucket", Bucket="everloop")
    yield Settings(home=tmp_path / "home", adapters_url="s3://everloop/adapters", adapters_options=options)
    fs.invalidate_cache()
    fs.rm("everloop", recursive=True)


@pytest.fixture
def source(tmp_path):
    return make_adapter(tmp_path / "source")


def keep(store, source):
    digest = adapter_digest(file_digests(source))
    with store.staged(source) as staged:
        store.put(staged, digest, {"digest": digest})
    return digest


def test_an_adapter_goes_to_s3_and_comes_back_to_another_machine(settings, source, tmp_path):
    store = open_store(settings)
    assert isinstance(store, BucketStore)
    digest = keep(store, source)
    store.annotate(digest, "README.md", "A card.")
    elsewhere = open_store(settings.model_copy(update={"home": tmp_path / "elsewhere"}))
    path = elsewhere.fetch(digest)
    assert path == tmp_path / "elsewhere" / "cache" / "adapters" / digest
    assert sorted(p.name for p in path.iterdir()) == sorted([*ADAPTER_FILES, MANIFEST])
    assert all((path / name).read_bytes() == (source / name).read_bytes() for name in ADAPTER_FILES)
    assert store.digests() == {digest} and keep(store, source) == digest
    store.delete(digest)
    assert elsewhere.digests() == set()
    shutil.rmtree(path)
    with pytest.raises(IntegrityError) as refused:
        elsewhere.fetch(digest)
    assert refused.value.code == "adapter_missing"


def test_an_object_that_changed_is_not_loaded(settings, source):
    store = open_store(settings)
    digest = keep(store, source)
    shutil.rmtree(store.directory)
    store._fs.pipe_file(f"everloop/adapters/{digest}/{ADAPTER_FILES[1]}", b"other weights")
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_changed"


def test_a_server_that_goes_away_in_mid_upload_leaves_no_adapter(settings, source, server, monkeypatch, caplog):
    store = open_store(settings)
    put_file = store._fs.put_file

    def put_and_stop(*args):
        put_file(*args)
        server.stop()

    monkeypatch.setattr(store._fs, "put_file", put_and_stop)
    with pytest.raises(UnavailableError) as failed:
        keep(store, source)
    monkeypatch.undo()
    assert failed.value.code == "adapter_store_unavailable"
    assert SECRET not in failed.value.message + caplog.text
    assert list(store.directory.iterdir()) == []
    server.start()
    digest = adapter_digest(file_digests(source))
    assert store.digests() == {digest}, "a file is there, and without its manifest no adapter"
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_missing"
    assert store.sweep(86_400.0) == 0 and store.sweep(-60.0) == 1 and store.digests() == set()
    assert keep(store, source) == digest
    store.fetch(digest)


def test_a_backup_of_what_is_in_a_bucket_is_restored_into_another_place(
    settings, database, source, tmp_path, monkeypatch
):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    settings = settings.model_copy(
        update={"base_model": str(make_base(tmp_path / "base")), "database_url": url, "public_url": "http://unused"}
    )
    with database.begin() as session:
        registry.register(session, settings, source, run_id=None, manifest={}, name="mine")
    take(settings, tmp_path / "monday", print)
    elsewhere = {
        "EVERLOOP_HOME": str(tmp_path / "new"),
        "EVERLOOP_ADAPTERS_URL": "s3://everloop/elsewhere",
        "EVERLOOP_ADAPTERS_OPTIONS": json.dumps(settings.adapters_options),
    }
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    report = restore(tmp_path / "monday", print)
    assert (report["adapters"], report["missing_adapters"]) == (1, [])
    there = open_store(settings.model_copy(update={"adapters_url": "s3://everloop/elsewhere"}))
    assert list(there.digests()) == list(open_store(settings).digests()) != []
    assert SECRET not in "".join(path.read_text(errors="replace") for path in (tmp_path / "monday").rglob("*.*"))
