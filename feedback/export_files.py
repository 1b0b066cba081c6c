"""The file of an export: whole or not there, as lines or as Parquet."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import InvalidRequestError

PAGE_ROWS = 500


@contextmanager
def appearing(path: Path, force: bool) -> Iterator[Path]:
    """Yield a file beside `path` that takes its name when the block has ended well."""
    _refuse_existing(path, force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error}.", code="file_not_writable") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _refuse_existing(path, force)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_existing(path: Path, force: bool) -> None:
    if path.is_dir() or (path.exists() and not force):
        raise InvalidRequestError(f"{path} is there already; --force replaces a file.", code="file_exists")


def write_lines(path: Path, rows: Iterable[dict[str, Any]], *, compress: bool) -> int:
    """Write rows as JSON lines and return how many."""
    num_rows = 0
    with gzip.open(path, "wb") if compress else path.open("wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write answers with their signals as Parquet and return how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    moment, text = pa.timestamp("us", tz="UTC"), pa.string()
    said = {"kind": text, "user": text, "value": pa.int8(), "score": pa.float64(), "name": text}
    said |= {"reasons": pa.list_(text), "over": text, "text": text, "given_at": moment}
    message = pa.struct({"role": text, "content": text})
    columns = {"id": text, "created_at": moment, "user": text, "release": text, "messages": pa.list_(message)}
    columns |= {"steps": text}  # JSON: each tool returns what it likes
    schema = pa.schema({**columns, "answer": text, "signals": pa.list_(pa.struct(said))})
    num_rows, rows = 0, iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while page := list(itertools.islice(rows, PAGE_ROWS)):
            page = [{**row, "steps": json.dumps(row.get("steps", []), ensure_ascii=False)} for row in page]
            writer.write_table(pa.Table.from_pylist(page, schema))
            num_rows += len(page)
    return num_rows
