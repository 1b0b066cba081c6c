"""Adapters in an object store (S3 and friends, through fsspec), with a cache under the home.

An object appears whole or not at all, a set of them does not: the manifest is written last, and an adapter without
its manifest does not exist.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from deploy.adapter_files import ADAPTER_FILES, is_digest
from deploy.store import MANIFEST, DirectoryStore, check_files, missing, unavailable
from infra.errors import EverloopError, IntegrityError, SetupError

log = logging.getLogger("everloop.store")


def file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system of an fsspec address, and the path within it.

    Raises
    ------
    SetupError
        Code ``adapters_url_invalid``; neither address nor options are quoted, which may hold secrets.
    """
    try:
        fs, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise SetupError(
            f"adapters_url needs a package that is not installed: {error}. For S3 it is the extra `s3`.",
            code="adapters_url_invalid",
        ) from error
    except (ValueError, TypeError) as error:
        raise SetupError(
            f"adapters_url and adapters_options name no file system that fsspec knows ({type(error).__name__}). An "
            "example is s3://bucket/prefix.",
            code="adapters_url_invalid",
        ) from None
    return fs, root.rstrip("/")


class BucketStore(DirectoryStore):
    """Adapters behind an fsspec file system; the directory is their cache.

    Parameters
    ----------
    directory
        The cache: what is there and whole is used without asking the store.
    fs, root
        The file system, and the prefix of all adapters in it.
    """

    def __init__(self, directory: Path, fs: Any, root: str) -> None:
        super().__init__(directory)
        self._fs = fs
        self._root = root

    def put(self, staged: Path, digest: str, manifest: Mapping[str, Any]) -> None:
        """Upload a staged adapter, its manifest last.

        Raises
        ------
        UnavailableError
            Code ``adapter_store_unavailable``; what was uploaded by then is removed, or else never exists.
        """
        with self._reaching():
            is_new = not self._exists(digest)
            try:
                for name in ADAPTER_FILES:
                    self._fs.put_file(str(staged / name), self._url(digest, name))
                text = json.dumps(manifest, indent=2, sort_keys=True)
                self._fs.pipe_file(self._url(digest, MANIFEST), text.encode())
            except BaseException:
                if is_new:
                    with suppress(Exception):
                        self._fs.rm(self._url(digest), recursive=True)
                raise
        with suppress(OSError):  # the next who loads it fetches it
            super().put(staged, digest, manifest)

    def fetch(self, digest: str) -> Path:
        """Return the cached directory of an adapter, checked now; fetched once where it is missing or damaged."""
        place = self.place(digest)
        try:
            return super().fetch(digest)
        except IntegrityError as error:
            if error.code != "adapter_missing":
                log.warning("the cached copy of adapter %s is damaged [%s]; fetching it", digest[:12], error.code)
        with self._reaching():
            if not self._exists(digest):
                raise missing(digest)
            with self._staging() as staging:
                for name in (*ADAPTER_FILES, MANIFEST):
                    self._fs.get_file(self._url(digest, name), str(staging / name))
                check_files(staging, digest)
                self._keep(staging, digest)
        return place

    def annotate(self, digest: str, name: str, text: str) -> None:
        """Put a text beside an adapter's files; it is no part of its digest."""
        with self._reaching():
            self._fs.pipe_file(self._url(digest, name), text.encode())

    def delete(self, digest: str) -> None:
        """Remove an adapter's files here and from the cache, the manifest first."""
        url = self._url(digest)
        with self._reaching():
            if self._exists(digest):
                self._fs.rm_file(self._url(digest, MANIFEST))
            self._fs.invalidate_cache()
            if self._fs.exists(url):
                self._fs.rm(url, recursive=True)
        super().delete(digest)

    def digests(self) -> set[str]:
        """Return the digests of the adapters that lie here, half-uploaded ones too."""
        return set(self._uploaded())

    def sweep(self, older_than_s: float) -> int:
        """Remove adapters whose upload broke off, and what fetching left in the cache."""
        until_s = time.time() - older_than_s
        broken = [
            digest
            for digest, files in self._uploaded().items()
            if MANIFEST not in files and max(map(_modified_s, files.values())) < until_s
        ]
        for digest in broken:
            self.delete(digest)
        return len(broken) + super().sweep(older_than_s)

    def _uploaded(self) -> dict[str, dict[str, Any]]:
        """Return what lies under each digest: names and what the store says of them."""
        found: dict[str, dict[str, Any]] = {}
        with self._reaching():
            self._fs.invalidate_cache()
            for path, info in self._fs.find(self._root, detail=True).items():
                digest, _, name = path.removeprefix(self._root).strip("/").partition("/")
                if is_digest(digest):
                    found.setdefault(digest, {})[name] = info
        return found

    def _exists(self, digest: str) -> bool:
        self._fs.invalidate_cache()  # another process may have written since
        return bool(self._fs.exists(self._url(digest, MANIFEST)))

    def _url(self, digest: str, name: str = "") -> str:
        return f"{self._root}/{self.place(digest).name}/{name}".rstrip("/")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what the store's client raises, which is its own in each, into an error that helps."""
        try:
            yield
        except EverloopError:
            raise
        except Exception as error:
            raise unavailable(error) from error


def _modified_s(info: Mapping[str, Any]) -> float:
    """Return when an object was written; one that does not say counts as new."""
    for key in ("LastModified", "mtime", "last_modified", "created"):
        at = info.get(key)
        if isinstance(at, datetime):
            return at.timestamp()
        if isinstance(at, int | float):
            return float(at)
    return time.time()
