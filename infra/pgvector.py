"""The index of turns' vectors, by which what was said in other words is found: PostgreSQL's extension ``vector``.

The table is everybody's (it holds plain arrays); extension and index are made only where the encoder is on, so that
a PostgreSQL without the extension serves whoever does not ask for it.
"""

from __future__ import annotations

import logging

import psycopg
from psycopg import sql

from infra import sentence_model
from infra.db import plain_dsn
from infra.errors import SetupError
from infra.settings import Settings

log = logging.getLogger("everloop.infra")
EXTENSION, INDEX = "vector", "ix_turn_vectors_embedding"
LOADED = "SELECT CAST('[1]' AS vector)"  # what the catalog says, the server's files need not hold
LEAST_VERSION = (0, 8)  # has iterative scans: without them a filter leaves little of what an index found


def prepare(settings: Settings) -> None:
    """Make extension and index for the encoder of the settings; where there is none, drop index and vectors.

    Safe to repeat. Vectors that are deleted, as those of another number of dimensions are, are made anew as their
    conversations go on.

    Raises
    ------
    SetupError
        Code ``pgvector_missing`` where PostgreSQL does not have the extension, has one that is too old, or its user
        may not make it.
    """
    with psycopg.connect(plain_dsn(settings.need("database_url")), connect_timeout=5) as connection:
        if settings.memory_encoder == "off":
            _clear(connection)
            return
        try:
            connection.execute(sql.SQL("CREATE EXTENSION IF NOT EXISTS {}").format(sql.Identifier(EXTENSION)))
            connection.execute(LOADED)
        except (
            psycopg.errors.UndefinedFile,
            psycopg.errors.FeatureNotSupported,
            psycopg.errors.InsufficientPrivilege,
        ) as error:
            why = str(error).strip().splitlines()[0]
            raise SetupError(
                f"EVERLOOP_MEMORY_ENCODER is {settings.memory_encoder}, and PostgreSQL cannot make the extension "
                f"vector ({why}). Install pgvector there (Debian: postgresql-NN-pgvector), have its owner run "
                "CREATE EXTENSION vector, or set the encoder to off.",
                code="pgvector_missing",
            ) from error
        if (version := _version(connection)) < LEAST_VERSION:
            raise SetupError(
                f"PostgreSQL has pgvector {'.'.join(map(str, version))}; memory's encoder needs "
                f"{'.'.join(map(str, LEAST_VERSION))} or later. Update it, or set EVERLOOP_MEMORY_ENCODER to off.",
                code="pgvector_missing",
            )
        _index(connection, sentence_model.dim(settings))


def _clear(connection: psycopg.Connection) -> None:
    """Drop index and vectors, where there is an index: nothing of what people said is kept that nobody uses."""
    if not _has_index(connection):
        return
    try:
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(INDEX)))
    except psycopg.errors.UndefinedFile as error:
        raise SetupError(
            "The database has an index of turns' vectors, and PostgreSQL lacks the library of its extension "
            f"({str(error).strip()}). No turn can be deleted like that: put pgvector back there, then set "
            "EVERLOOP_MEMORY_ENCODER to off.",
            code="pgvector_missing",
        ) from error
    connection.execute("TRUNCATE turn_vectors")


def is_ready(connection: psycopg.Connection) -> bool:
    """Tell whether a database has the index, and an extension that can search it as we do."""
    try:
        with connection.transaction():
            connection.execute(LOADED)
    except (psycopg.errors.UndefinedFile, psycopg.errors.UndefinedObject):
        return False
    return _has_index(connection) and _version(connection) >= LEAST_VERSION


def _has_index(connection: psycopg.Connection) -> bool:
    found = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [INDEX]).fetchone()
    return bool(found and found[0])


def _version(connection: psycopg.Connection) -> tuple[int, ...]:
    found = connection.execute("SELECT extversion FROM pg_extension WHERE extname = %s", [EXTENSION]).fetchone()
    return tuple(map(int, found[0].split("."))) if found else ()


def _index(connection: psycopg.Connection, dim: int) -> None:
    wanted = f"vector({dim})"
    found = connection.execute("SELECT indexdef FROM pg_indexes WHERE indexname = %s", [INDEX]).fetchone()
    if found and wanted in found[0]:
        return
    connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(INDEX)))
    others = "SELECT EXISTS (SELECT FROM turn_vectors WHERE cardinality(embedding) <> %s)"
    found = connection.execute(others, [dim]).fetchone()
    if found and found[0]:
        connection.execute("TRUNCATE turn_vectors")  # an index is built over rows that were just deleted, too
        log.info("the vectors are of another encoder: they are made anew as conversations go on")
    connection.execute(
        sql.SQL("CREATE INDEX {} ON turn_vectors USING hnsw ((embedding::{}) vector_cosine_ops)").format(
            sql.Identifier(INDEX), sql.SQL(wanted)
        )
    )
