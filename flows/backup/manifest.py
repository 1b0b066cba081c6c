"""What a backup holds: a directory of files, and a manifest with the SHA-256 of each.

The directory gets its name when it is whole, so what bears the name of a backup is one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import IntegrityError, InvalidRequestError

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "database.dump"
ADAPTERS, BACKBONES, DATASETS, RUNS, SETTINGS = "adapters", "backbones", "datasets", "runs", "settings"
CHUNK_BYTES = 1024**2


@dataclass(slots=True)
class Manifest:
    """What a backup says of itself.

    Attributes
    ----------
    revision
        The database's schema, as Alembic calls it.
    home
        Where the state lay; some rows name places in it.
    audit
        Entries of the audit log and the hash of the last, at the moment of the snapshot.
    reward
        The posterior of each encoder at that moment (:mod:`reward.verification`).
    counts
        Rows of the tables that people write to.
    missing_adapters
        Digests that the database names and the store did not have, or had changed: they were broken before.
    left_out
        Settings that hold secrets: they have to be set again.
    files
        SHA-256 and size of each file, by its path within the backup.
    """

    everloop: str
    taken_at: str
    revision: str
    home: str
    audit: dict[str, Any]
    reward: dict[str, Any]
    counts: dict[str, int]
    missing_adapters: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, directory: Path) -> str:
        """Hash all files of a directory and write the manifest; return the manifest's own SHA-256."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                found = {"sha256": sha256(path), "bytes": path.stat().st_size}
                self.files[path.relative_to(directory).as_posix()] = found
        target = directory / MANIFEST
        target.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
        return sha256(target)


def read(directory: Path, expected: str | None = None) -> Manifest:
    """Return the manifest of a backup after checking each of its files.

    Parameters
    ----------
    expected
        The manifest's own SHA-256, as it was told when the backup was taken.

    Raises
    ------
    InvalidRequestError
        Codes ``not_a_backup``, and ``backup_newer`` where a later version wrote it.
    IntegrityError
        Codes ``backup_changed`` and ``backup_truncated``, with the file.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text()
        found = json.loads(text)
        version = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{directory} is no backup, or not a whole one: it has no readable {MANIFEST}. Name the directory "
            "that `everloop backup` wrote.",
            code="not_a_backup",
        ) from error
    if version != FORMAT:
        raise newer(f"its format is {version}, and this version reads {FORMAT}")
    if expected is not None and sha256(path) != expected:
        raise _changed(MANIFEST, "it is not the one with the SHA-256 that was asked for")
    try:
        manifest = Manifest(**found)
    except TypeError as error:
        raise _changed(MANIFEST, "fields were added or are missing") from error
    for name, facts in manifest.files.items():
        _check(directory, name, facts)
    return manifest


def newer(why: str) -> InvalidRequestError:
    """Return the error that tells of a later version's backup."""
    return InvalidRequestError(
        f"The backup was taken by a later version of Everloop: {why}. Restore it with that one, or a later one.",
        code="backup_newer",
    )


def _check(directory: Path, name: str, facts: dict[str, Any]) -> None:
    path = directory / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise _changed(name, "it lies outside the backup")
    size = path.stat().st_size if path.is_file() else -1
    if size < facts["bytes"]:
        raise IntegrityError(
            f"{name} is missing from the backup, or was cut short ({max(size, 0)} of {facts['bytes']} bytes). Copy "
            "the backup again from where it was taken, or use another.",
            code="backup_truncated",
        )
    if size > facts["bytes"] or sha256(path) != facts["sha256"]:
        raise _changed(name, "its SHA-256 is another")


def _changed(name: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{name} was changed after the backup was taken: {why}. Nothing was restored; use another backup.",
        code="backup_changed",
    )


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
