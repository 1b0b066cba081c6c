"""The database: one engine per process, built by the composition root and handed down."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Self, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from infra.errors import ConflictError, UnavailableError

Sessions = sessionmaker[Session]
DATABASE_AWAY = (OperationalError, InterfaceError)
ENDING_S = 10.0  # a server that lost a client may take so long to end its session


class Base(DeclarativeBase):
    """Base of every table; the naming convention keeps migrations deterministic."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def connect(database_url: str, *, pool_size: int = 5) -> Sessions:
    """Return a session factory on a pooled engine.

    Parameters
    ----------
    database_url
        ``postgresql+psycopg://…``.
    pool_size
        Connections kept open; as many again may be opened under load.
    """
    engine = sa.create_engine(
        database_url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_timeout=10,
        hide_parameters=True,  # an error message goes into a log, and parameters hold what people said
    )
    return sessionmaker(engine, expire_on_commit=False)


def plain_dsn(database_url: str) -> str:
    """Return the address of a database as psycopg alone takes it, without SQLAlchemy's name of a driver."""
    return database_url.replace("postgresql+psycopg://", "postgresql://")


@contextmanager
def transaction(sessions: Sessions) -> Iterator[Session]:
    """Open a transaction; a database that is away becomes a 503 that says so."""
    try:
        with sessions.begin() as session:
            yield session
    except (*DATABASE_AWAY, PoolTimeoutError) as error:
        raise UnavailableError(
            "The database does not answer; nothing was written. Try again in a few seconds.",
            code="database_unavailable",
        ) from error


@contextmanager
def locked_connection(sessions: Sessions, name: str) -> Iterator[sa.Connection | None]:
    """Try to hold the lock `name` for the length of the block; yield the connection that holds it, or None.

    The lock ends with the process, however the process ends. Work that must not go on without the lock is done on
    this connection: when it is cut, the lock is free, and the work cannot commit.
    """
    engine: sa.Engine = sessions.kw["bind"]
    key = _lock_key(name)
    with engine.connect() as connection:
        held = bool(connection.scalar(sa.select(sa.func.pg_try_advisory_lock(key))))
        connection.commit()
        try:
            yield connection if held else None
        finally:
            if held and not connection.invalidated:
                with suppress(*DATABASE_AWAY):  # a connection that is cut holds no lock
                    connection.rollback()
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(key)))
                    connection.commit()


@contextmanager
def advisory_lock(sessions: Sessions, name: str) -> Iterator[bool]:
    """Try to hold the lock `name` for the length of the block; yield whether it is held."""
    with locked_connection(sessions, name) as connection:
        yield connection is not None


def is_locked(session: Session, name: str) -> bool:
    """Tell whether any process holds the lock `name` now."""
    query = """
        SELECT EXISTS (
            SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
            WHERE datname = current_database() AND locktype = 'advisory' AND objsubid = 1
            AND (classid::bigint << 32 | objid::bigint) = hashtextextended(:key, 0)
        )
    """
    return bool(session.scalar(sa.text(query), {"key": _lock_text(name)}))


class LockLostError(ConflictError):
    """A lock went with its connection, and another process took it."""

    code = "lock_lost"


class LongLock:
    """A lock for work that outlives a restart of the database: the lock does not, so it is taken again.

    Use it as a context manager. The lock ends with the process, however the process ends.
    """

    def __init__(self, sessions: Sessions, name: str) -> None:
        self._engine: sa.Engine = sessions.kw["bind"]
        self._key = _lock_key(name)
        self._name = name
        self._connection: sa.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            with suppress(*DATABASE_AWAY), self._connection as connection:
                connection.rollback()
                connection.execute(sa.select(sa.func.pg_advisory_unlock(self._key)))
                connection.commit()

    def take(self) -> bool:
        """Try to take the lock; tell whether it is held now."""
        with ExitStack() as stack:
            connection = stack.enter_context(self._engine.connect())
            if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(self._key))):
                connection.commit()
                self._connection = connection
                stack.pop_all()  # it stays open: the lock is its session's
        return self._connection is not None

    def keep(self) -> None:
        """Make sure that the lock is still held; with the database away, nobody else can take it either.

        Raises
        ------
        LockLostError
            Another process took it after the connection was cut.
        """
        if self._is_connected():
            return
        until_s = time.monotonic() + ENDING_S
        with suppress(*DATABASE_AWAY):
            while not self.take():  # the session that was cut may hold it for a moment
                if time.monotonic() > until_s:
                    raise LockLostError(f"Another process holds the lock {self._name!r} now.")
                time.sleep(0.2)

    def _is_connected(self) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.execute(sa.select(1))
            self._connection.commit()
        except DATABASE_AWAY:
            self._connection.close()
            self._connection = None
            return False
        return True


def lock_until_commit(session: Session, name: str) -> None:
    """Wait for the lock `name` and hold it until this transaction ends."""
    session.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_key(name))))


def _lock_key(name: str) -> sa.ColumnElement[int]:
    return sa.func.hashtextextended(_lock_text(name), 0)


def _lock_text(name: str) -> str:
    return f"everloop.{name}"


def among(column: Any, values: Iterable[str]) -> sa.ColumnElement[bool]:
    """Return the condition that a column holds one of `values`, as one parameter.

    A parameter for each value makes long statements that differ in length: they are neither prepared nor cached.
    """
    return cast(sa.ColumnElement[bool], column == sa.any_(sa.literal(sorted(set(values)), ARRAY(sa.Text))))


def unnest(types: Mapping[str, str]) -> str:
    """Return a FROM item of rows that come as one parameter per column: its name, and the type of its values."""
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in types.items())
    return f"unnest({arrays}) AS row({', '.join(types)})"


class ManyRows:
    """Writes rows of one table by one statement: a statement per row would cost more than all the rest.

    Parameters
    ----------
    types
        The columns that are written, and their types.
    key
        The primary key. A row that is there already gives way; without a key, it is an error.
    stamp
        A column that is set to the present time where a row gave way.
    """

    def __init__(
        self, table: str, types: Mapping[str, str], *, key: str | None = None, stamp: str | None = None
    ) -> None:
        self.types = types
        names = ", ".join(types)
        statement = f"INSERT INTO {table} ({names}) SELECT {names} FROM {unnest(types)}"
        if key is not None:
            changes = [f"{name} = excluded.{name}" for name in types if name != key]
            changes += [f"{stamp} = now()"] if stamp else []
            # In the order of the key: two that write the same rows wait for each other rather than deadlock.
            statement += f" ORDER BY {key} ON CONFLICT ({key}) DO UPDATE SET {', '.join(changes)}"
        self._statement = sa.text(statement)

    def write(self, session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; a column that one does not name is null in it."""
        if rows:
            session.execute(self._statement, {name: [row.get(name) for row in rows] for name in self.types})
