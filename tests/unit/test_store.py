"""Where adapters lie: whole or not at all, checked at each load, never outside; in a directory and in a bucket."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from deploy.adapter_files import ADAPTER_FILES, CONFIG, WEIGHTS, adapter_digest, file_digests
from deploy.bucket import BucketStore
from deploy.store import MANIFEST, DirectoryStore, open_store
from infra.errors import IntegrityError, SetupError, UnavailableError
from infra.settings import Settings
from tests.adapters import make_adapter

DAY_S = 86_400.0


@pytest.fixture(params=["directory", "bucket"])
def store(request, tmp_path):
    if request.param == "directory":
        return DirectoryStore(tmp_path / "adapters")
    return BucketStore(tmp_path / "cache", fsspec.filesystem("memory"), f"/bucket-{uuid.uuid4().hex}/adapters")


@pytest.fixture
def bucket(tmp_path):
    return BucketStore(tmp_path / "cache", fsspec.filesystem("memory"), f"/bucket-{uuid.uuid4().hex}/adapters")


@pytest.fixture
def source(tmp_path):
    return make_adapter(tmp_path / "source")


def keep(store, source):
    digest = adapter_digest(file_digests(source))
    with store.staged(source) as staged:
        store.put(staged, digest, {"digest": digest})
    return digest


def flip(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def left(store):
    return sorted(path.name for path in store.directory.iterdir())


def test_what_was_put_is_fetched_as_it_was_and_may_be_put_again(store, source):
    digest = keep(store, source)
    assert keep(store, source) == digest and store.digests() == {digest}
    path = store.fetch(digest)
    for name in ADAPTER_FILES:
        assert (path / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((path / MANIFEST).read_text()) == {"digest": digest}
    assert left(store) == [digest], "nothing stays of the staging"


def test_what_is_not_there_is_missing_and_deleting_it_is_no_error(store, source):
    digest = adapter_digest(file_digests(source))
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_missing"
    store.delete(digest)
    keep(store, source)
    store.delete(digest)
    with pytest.raises(IntegrityError):
        store.fetch(digest)
    assert store.digests() == set() and left(store) == []


@pytest.mark.parametrize("digest", ["../adapters", "", ".", "/etc", "a" * 63, "A" * 64, "a" * 63 + "/", "a" * 65])
def test_nothing_outside_the_store_is_reached(store, source, digest):
    for use in (
        store.fetch,
        store.delete,
        lambda d: store.annotate(d, "x", ""),
        lambda d: keep_as(store, source, d),
    ):
        with pytest.raises(IntegrityError) as refused:
            use(digest)
        assert refused.value.code == "adapter_outside_store"


def keep_as(store, source, digest):
    with store.staged(source) as staged:
        store.put(staged, digest, {})


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_file_that_changed_is_found_at_each_load(tmp_path, source, name):
    store = DirectoryStore(tmp_path / "adapters")
    digest = keep(store, source)
    store.fetch(digest)
    flip(store.place(digest) / name)
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_changed"
    keep(store, source)  # to register it again mends it
    store.fetch(digest)


def test_a_link_in_the_store_is_refused(tmp_path, source):
    store = DirectoryStore(tmp_path / "adapters")
    digest = keep(store, source)
    place = store.place(digest)
    (place / WEIGHTS).unlink()
    (place / WEIGHTS).symlink_to(source / WEIGHTS)
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_unsafe"
    shutil.rmtree(place)
    place.symlink_to(source)
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_unsafe"
    store.delete(digest)
    assert (source / WEIGHTS).exists() and not place.is_symlink(), "the link goes, not what it leads to"


def test_what_was_added_to_a_kept_adapter_is_refused_but_for_its_card(tmp_path, source):
    store = DirectoryStore(tmp_path / "adapters")
    digest = keep(store, source)
    store.annotate(digest, "README.md", "A card.")
    assert (store.fetch(digest) / "README.md").read_text() == "A card."
    (store.place(digest) / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError) as refused:
        store.fetch(digest)
    assert refused.value.code == "adapter_unsafe"


def test_a_source_that_changes_while_it_is_registered_is_kept_as_it_was_checked(store, source):
    digest = adapter_digest(file_digests(source))
    with store.staged(source) as staged:
        flip(source / WEIGHTS)
        assert adapter_digest(file_digests(staged)) == digest
        store.put(staged, digest, {})
    store.fetch(digest)


FULL_DISK = """
import sys
from pathlib import Path
from deploy.store import DirectoryStore
from tests.unit.test_store import keep
store = DirectoryStore(Path(sys.argv[1]) / "adapters")
digest = keep(store, Path(sys.argv[2]))
try:
    keep(store, Path(sys.argv[3]))
except OSError as error:
    print(error.errno, sorted(path.name for path in store.directory.iterdir()) == [digest])
store.fetch(digest)
"""


def test_a_disk_that_fills_in_mid_copy_leaves_what_was_there(tmp_path, source):
    """On a real file system of 200 KiB, in a namespace of its own."""
    import numpy as np

    large = make_adapter(tmp_path / "large", weights={"x": np.zeros(100_000, np.float32)})
    mount = tmp_path / "small"
    mount.mkdir()
    script = 'mount -t tmpfs -o size=200k none "$1" && exec "$2" -c "$3" "$1" "$4" "$5"'
    arguments = [str(mount), sys.executable, FULL_DISK, str(source), str(large)]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment())
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip(f"no mounts in a namespace here: {done.stderr.strip()}")
    assert done.stdout.split() == [str(errno.ENOSPC), "True"], done.stderr


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def test_a_disk_that_fills_leaves_nothing_of_a_copy(store, source, monkeypatch):
    def fill(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deploy.store.shutil.copyfile", fill)
    with pytest.raises(OSError, match="No space left"):
        keep(store, source)
    assert left(store) == [] and store.digests() == set()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_upload_that_breaks_off_leaves_no_adapter(bucket, source, monkeypatch, fails_at):
    calls = 0

    def breaking(real):
        def upload(*args, **options):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise ConnectionResetError("secret-key-in-a-message")
            return real(*args, **options)

        return upload

    monkeypatch.setattr(bucket, "_fs", fsspec.filesystem("memory", skip_instance_cache=True))
    for name in ("put_file", "pipe_file"):
        monkeypatch.setattr(bucket._fs, name, breaking(getattr(bucket._fs, name)))
    with pytest.raises(UnavailableError) as failed:
        keep(bucket, source)
    assert failed.value.code == "adapter_store_unavailable" and "secret" not in failed.value.message
    assert bucket.digests() == set() and left(bucket) == []
    digest = keep(bucket, source)  # the next try is not in the way of the first
    bucket.fetch(digest)


def test_a_broken_upload_again_does_not_take_away_what_is_there(bucket, source, monkeypatch):
    digest = keep(bucket, source)
    monkeypatch.setattr(bucket._fs, "put_file", lambda *_: (_ for _ in ()).throw(ConnectionResetError()))
    with pytest.raises(UnavailableError):
        keep(bucket, source)
    monkeypatch.undo()
    shutil.rmtree(bucket.directory)
    bucket.fetch(digest)


def test_an_adapter_without_its_manifest_does_not_exist_and_is_swept_in_time(bucket, source):
    digest = keep(bucket, source)
    assert bucket.sweep(-1.0) == 0, "a whole one is never swept"
    shutil.rmtree(bucket.directory)
    bucket._fs.rm_file(f"{bucket._root}/{digest}/{MANIFEST}")
    with pytest.raises(IntegrityError) as refused:
        bucket.fetch(digest)
    assert refused.value.code == "adapter_missing"
    assert bucket.sweep(DAY_S) == 0 and bucket.digests() == {digest}
    assert bucket.sweep(-1.0) == 1 and bucket.digests() == set()


def test_a_damaged_copy_in_the_cache_is_fetched_again_and_a_whole_one_is_not(bucket, source, monkeypatch):
    digest = keep(bucket, source)
    fetched = []
    real = bucket._fs.get_file
    monkeypatch.setattr(bucket._fs, "get_file", lambda *args: fetched.append(args[0]) or real(*args))
    bucket.fetch(digest)
    assert fetched == []
    flip(bucket.place(digest) / WEIGHTS)
    bucket.fetch(digest)
    assert len(fetched) == 3 and left(bucket) == [digest]
    shutil.rmtree(bucket.directory)
    bucket.fetch(digest)
    assert len(fetched) == 6


def test_an_object_that_changed_is_never_loaded_and_does_not_stay_in_the_cache(bucket, source):
    digest = keep(bucket, source)
    shutil.rmtree(bucket.directory)
    url = f"{bucket._root}/{digest}/{CONFIG}"
    bucket._fs.pipe_file(url, bucket._fs.cat_file(url) + b" ")
    with pytest.raises(IntegrityError) as refused:
        bucket.fetch(digest)
    assert refused.value.code == "adapter_changed" and left(bucket) == []


def test_while_the_bucket_is_away_a_cached_adapter_is_loaded_and_another_is_told(bucket, source, monkeypatch):
    digest = keep(bucket, source)

    def away(*_, **__):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    for name in ("exists", "get_file", "find"):
        monkeypatch.setattr(bucket._fs, name, away)
    bucket.fetch(digest)
    shutil.rmtree(bucket.directory)
    for use in (lambda: bucket.fetch(digest), bucket.digests):
        with pytest.raises(UnavailableError, match="No route to host") as failed:
            use()
        assert failed.value.code == "adapter_store_unavailable"


def test_leftovers_are_swept_once_they_are_old(store, source):
    digest = keep(store, source)
    for name, age_s in ((".young", DAY_S / 2), (".old", 2 * DAY_S)):
        (store.directory / name).mkdir()
        os.utime(store.directory / name, (time.time() - age_s,) * 2)
    assert store.sweep(DAY_S) == 1
    assert left(store) == [".young", digest]


def test_settings_choose_the_store(tmp_path):
    assert open_store(Settings(home=tmp_path)).directory == tmp_path / "adapters"
    for url in (str(tmp_path / "x"), f"file://{tmp_path}/x"):
        store = open_store(Settings(home=tmp_path, adapters_url=url))
        assert type(store) is DirectoryStore and store.directory == tmp_path / "x"
    store = open_store(Settings(home=tmp_path, adapters_url="memory://a/b"))
    assert isinstance(store, BucketStore) and store.directory == tmp_path / "cache" / "adapters"


@pytest.mark.parametrize("url", ["nothing-such://bucket/x", "ftp://me:hunter2@host/x"])
def test_an_address_that_is_none_is_told_without_its_secrets(tmp_path, url):
    settings = Settings(home=tmp_path, adapters_url=url, adapters_options={"secret": "hunter2"})
    with pytest.raises(SetupError) as refused:
        open_store(settings)
    assert refused.value.code == "adapters_url_invalid" and "hunter2" not in refused.value.message
    assert "hunter2" not in repr(settings).replace(url, "")
