"""The files of an adapter: which are taken, which must not lie beside them, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from infra.errors import IntegrityError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)
# What PEFT and model hubs put beside an adapter, and nobody loads as one. All else could be loaded instead of it
# (adapter_model.bin, new_embeddings.safetensors), or runs when it is (pickles, Python).
HARMLESS_SUFFIXES = frozenset({".json", ".md", ".txt", ".jinja"})
HARMLESS_NAMES = frozenset({"LICENSE", ".gitattributes", ".gitignore"})
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_directory(directory: Path) -> None:
    """Check that a directory holds an adapter's files, and nothing that could be loaded in their place.

    Raises
    ------
    IntegrityError
        Code ``adapter_incomplete`` where a file is missing, ``adapter_unsafe`` for links, pickles and all else that
        is not known to be harmless.
    """
    if directory.is_symlink():
        raise IntegrityError("An adapter is a directory, and no link to one.", code="adapter_unsafe")
    if not directory.is_dir():
        raise IntegrityError(f"There is no directory {directory}.", code="adapter_incomplete")
    for path in sorted(directory.iterdir()):
        name = path.name
        if path.is_symlink():
            raise IntegrityError(f"{name} is a link; adapters are plain files.", code="adapter_unsafe")
        if name in ADAPTER_FILES and path.is_file():
            continue
        if not path.is_file() or not (path.suffix in HARMLESS_SUFFIXES or name in HARMLESS_NAMES):
            raise IntegrityError(
                f"{name} lies beside the adapter: an engine could load or run it. An adapter is {CONFIG} and "
                f"{WEIGHTS}, and may come with texts; put these into a directory of their own.",
                code="adapter_unsafe",
            )
    for name in ADAPTER_FILES:
        if not (directory / name).is_file():
            raise IntegrityError(f"The adapter has no {name}.", code="adapter_incomplete")


def file_digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an adapter, as lower-case hexadecimal.

    Raises
    ------
    IntegrityError
        As :func:`check_directory` does.
    """
    check_directory(directory)
    digests = {}
    for name in ADAPTER_FILES:
        with (directory / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def adapter_digest(files: Mapping[str, str]) -> str:
    """Return the digest that names an adapter, from the digests of its files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def is_digest(text: str) -> bool:
    """Tell whether a text is a SHA-256 digest, and so safe as a part of a path."""
    return _DIGEST.fullmatch(text) is not None
