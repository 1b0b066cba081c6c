"""Where the files of adapters lie: one directory per digest, in a directory or behind an fsspec address.

What is fetched was checked against its digest just now. The place of an adapter follows from its digest alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.adapter_files import ADAPTER_FILES, adapter_digest, check_directory, file_digests, is_digest
from infra.errors import IntegrityError, SetupError, UnavailableError
from infra.files import write_whole
from infra.settings import Settings

log = logging.getLogger("everloop.store")

MANIFEST = "everloop.json"
CARD = "README.md"


class DirectoryStore:
    """Adapters in a directory, each under its digest.

    An adapter appears by one rename, whole, and disappears by one: whoever reads meets all of it or nothing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def place(self, digest: str) -> Path:
        """Return the directory of an adapter, there or not.

        Raises
        ------
        IntegrityError
            Code ``adapter_outside_store`` where the digest is none, and might lead anywhere.
        """
        if not is_digest(digest):
            raise IntegrityError(
                f"{digest[:80]!r} is no SHA-256 digest, so it names nothing within the store of adapters.",
                code="adapter_outside_store",
            )
        return self.directory / digest

    @contextmanager
    def staged(self, source: Path) -> Iterator[Path]:
        """Copy an adapter's files to a directory of their own, for the length of the block.

        Raises
        ------
        IntegrityError
            As :func:`deploy.adapter_files.check_directory` does.
        OSError
            Such as a full disk; then nothing is left of the copy.
        """
        check_directory(source)
        with self._staging() as staging:
            for name in ADAPTER_FILES:
                shutil.copyfile(source / name, staging / name)
            yield staging

    def put(self, staged: Path, digest: str, manifest: Mapping[str, Any]) -> None:
        """Keep a staged adapter under its digest; safe to repeat, and mends one that was damaged.

        Raises
        ------
        OSError
            Such as a full disk; then the store is as it was.
        """
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
        self._keep(staged, digest)

    def fetch(self, digest: str) -> Path:
        """Return the directory of an adapter whose every file was checked now.

        Raises
        ------
        IntegrityError
            Codes ``adapter_missing``, ``adapter_changed``, ``adapter_unsafe``, ``adapter_incomplete``,
            ``adapter_outside_store``.
        UnavailableError
            Code ``adapter_store_unavailable``.
        """
        place = self.place(digest)
        with _disk():
            if not (place.exists() or place.is_symlink()):
                raise missing(digest)
            check_files(place, digest)
        return place

    def annotate(self, digest: str, name: str, text: str) -> None:
        """Put a text beside an adapter's files; it is no part of its digest."""
        write_whole(self.place(digest) / name, text)

    def delete(self, digest: str) -> None:
        """Remove an adapter's files, if there are any."""
        with _disk():
            self._remove(self.place(digest))

    def digests(self) -> set[str]:
        """Return the digests of the adapters that lie here."""
        return {path.name for path in self._entries() if is_digest(path.name)}

    def sweep(self, older_than_s: float) -> int:
        """Remove what a crash left half-written, and return how many; what is younger may still be written."""
        until_s = time.time() - older_than_s
        left = [path for path in self._entries() if path.name.startswith(".") and path.lstat().st_mtime < until_s]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def _entries(self) -> list[Path]:
        with _disk():
            return list(self.directory.iterdir()) if self.directory.is_dir() else []

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = self.directory / f".{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _keep(self, staged: Path, digest: str) -> None:
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before what it names
        place = self.place(digest)
        self._remove(place)
        staged.rename(place)

    def _remove(self, place: Path) -> None:
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            gone = place.with_name(f".{uuid.uuid4().hex}")
            place.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def open_store(settings: Settings) -> DirectoryStore:
    """Return the store that the settings name.

    Raises
    ------
    SetupError
        Code ``adapters_url_invalid``; the message holds no secret.
    """
    if settings.adapters_url is None:
        return DirectoryStore(settings.adapters_dir)
    from deploy.bucket import BucketStore, file_system

    if "@" in urlsplit(settings.adapters_url).netloc:
        raise SetupError(
            "adapters_url holds a user or a password. Put them into adapters_options, which nothing shows.",
            code="adapters_url_invalid",
        )
    fs, root = file_system(settings.adapters_url, settings.adapters_options)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return DirectoryStore(Path(root))
    return BucketStore(settings.home / "cache" / "adapters", fs, root)


def check_files(directory: Path, digest: str) -> None:
    """Check an adapter's files against its digest.

    Raises
    ------
    IntegrityError
        Code ``adapter_changed``, or as :func:`deploy.adapter_files.check_directory` does.
    """
    if adapter_digest(file_digests(directory)) != digest:
        raise IntegrityError(
            f"The files of adapter {digest[:12]} changed after it was registered; it will not be loaded. Register "
            "it again from where it came, or promote another release.",
            code="adapter_changed",
        )


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> UnavailableError:
    """Return the error that tells of a store, or a disk, that failed."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return UnavailableError(
        f"The store of adapters, or the disk of the home, failed: {what}. Nothing was changed; once it answers and "
        "there is space, try again.",
        code="adapter_store_unavailable",
    )


def missing(digest: str) -> IntegrityError:
    """Return the error that tells of an adapter without files."""
    return IntegrityError(
        f"The files of adapter {digest[:12]} are not in the store. Register it again from where it came, or "
        "promote another release.",
        code="adapter_missing",
    )
