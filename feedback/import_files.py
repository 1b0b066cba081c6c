"""The files of an import: the one that is read, and the one beside it that says what could not be taken."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self

from infra.errors import ConflictError, EverloopError, InvalidRequestError

GZIP_MAGIC = b"\x1f\x8b"
BLOCK_BYTES = 1 << 20
SUFFIX = ".rejected.jsonl"


class Source:
    """A file of lines, plain or compressed with gzip. It is read through once before anything is imported.

    Attributes
    ----------
    digest
        SHA-256 of the lines; compressing a file does not make it another one.
    date
        When it was last written.
    """

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self.path = path
        self.max_line_bytes = max_line_bytes
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        try:
            self._file = self.path.open("rb")
            self._compressed = self._file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            self._stamp = self._read_stamp()
            self.date = datetime.fromtimestamp(min(self._stamp[1] / 1e9, datetime.now(UTC).timestamp()), UTC)
            self._survey()
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidRequestError(
                f"{self.path} cannot be read: {error}. Nothing was imported.", code="file_not_readable"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _survey(self) -> None:
        digest, self.num_lines, block, last = hashlib.sha256(), 0, b"", b"\n"
        stream = self._stream()
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            self.num_lines += block.count(b"\n")
            last = block[-1:]
        self.num_lines += last != b"\n"
        self.digest = digest.hexdigest()

    def _stream(self) -> IO[bytes]:
        self._file.seek(0)
        return gzip.open(self._file) if self._compressed else self._file  # type: ignore[return-value]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line but blank ones with its number, from 1; of one that is too long, what shows it."""
        stream, number = self._stream(), 0
        limit = self.max_line_bytes + len(b"\r\n")
        while raw := stream.readline(limit):
            number += 1
            rest = raw
            while len(rest) and not rest.endswith(b"\n"):
                rest = stream.readline(BLOCK_BYTES)
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip() or len(line) > self.max_line_bytes:
                yield number, line

    def check_unchanged(self) -> None:
        """Make sure that the file is still the one that was surveyed.

        Raises
        ------
        ConflictError
            Code ``file_changed``.
        """
        if self._read_stamp() != self._stamp:
            raise ConflictError(
                f"{self.path} was written to while it was imported. What was imported stays; start again when "
                "it is whole. Lines with an `id` and a `created_at` are not imported twice.",
                code="file_changed",
            )

    def _read_stamp(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


class Rejects:
    """The lines of a source that could not be taken, each with a stable code and the reason.

    Parameters
    ----------
    next_line
        The first line that is not imported yet. What an unfinished run noted from there on is cut off.

    Raises
    ------
    InvalidRequestError
        Code ``rejected_file_in_the_way``: what stands there under this name was written by somebody else.
    """

    def __init__(self, source: Source, next_line: int) -> None:
        self.path = source.path.with_name(source.path.name + SUFFIX)
        self.next_line = next_line
        if not self.path.exists():
            return
        keep_bytes = 0
        with self.path.open("rb") as file:
            for raw in file:
                number = self._line_number(raw)
                if number is None or number >= next_line:
                    break
                keep_bytes += len(raw)
        if keep_bytes:
            os.truncate(self.path, keep_bytes)
        else:
            self.path.unlink()

    def _line_number(self, raw: bytes) -> int | None:
        """Return which line a note is about; None for one that was not written to its end."""
        start = b'{"line": '
        try:
            note = json.loads(raw)
            if isinstance(note, dict) and note.keys() == {"line", "code", "reason"}:
                return int(note["line"])
        except ValueError:
            if not raw.endswith(b"\n") and raw[: len(start)] == start[: len(raw)]:
                return None
        raise InvalidRequestError(
            f"{self.path} is no list of rejected lines; move it away.", code="rejected_file_in_the_way"
        )

    def add(self, refused: Mapping[int, EverloopError], next_line: int) -> None:
        """Note refusals by line number, to the disk; the lines before `next_line` are then dealt with."""
        if refused:
            with self.path.open("ab") as file:
                for number, error in sorted(refused.items()):
                    note = {"line": number, "code": error.code, "reason": error.message}
                    file.write(json.dumps(note).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.next_line = next_line
