"""A read model in a file of SQLite: nothing to install, nothing to run."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Column, Connection, Engine, bindparam, create_engine, event, func, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.elements import ColumnElement

from outbox.errors import ConfigError, SchemaError
from outbox.read_model.declared import Declared
from outbox.read_model.dialect import Blame
from outbox.read_model.sql import SqlStore

_SECONDS = 30.0
# A millisecond, and as many as SQLite's integers take: its 0 would not wait at all.
_LEAST_SECONDS, _MOST_SECONDS = 0.001, 2_147_483.0
_OF_A_MOMENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
_OF_VALUES = {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}


class SqliteStore(SqlStore):
    """A read model in a file. Readers go on while it is written (WAL); one transaction writes at a time.

    `seconds` (0.001 to 2,147,483): how long a transaction waits for another one. `ConfigError` when it cannot be used.
    """

    def __init__(self, path: str | Path, *, seconds: float = _SECONDS) -> None:
        super().__init__(sqlite.insert, schema=None)
        self._path = Path(path)
        if str(path) in {"", ":memory:"}:
            raise ConfigError(
                f"{str(path)!r} is no file, and a copy that is lost with the process is none.", cure="Name a file."
            )
        if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
            raise ConfigError(
                f"seconds of a SqliteStore cannot be {seconds!r}.",
                cure=f"Let it be {_LEAST_SECONDS:g} to {_MOST_SECONDS:,.0f}; {_SECONDS:g} is the default.",
            )
        self._seconds = seconds

    def open(self, declared: Declared) -> None:
        """See `Store.open`; a file that is missing is not made."""
        if self._engine is None and not self._path.exists():
            raise SchemaError(
                f"There is no file {self._path} for the read model {declared.name}.",
                cure="Make it by the service's migrations, or by store.create(declared); or correct the path.",
            )
        super().open(declared)

    def _connect(self) -> Engine:
        if self._path.is_dir() or not self._path.absolute().parent.is_dir():
            raise ConfigError(f"{self._path} cannot be a file.", cure="Correct the path, or make its directory.")
        engine = create_engine(
            f"sqlite:///{self._path.absolute()}",
            poolclass=QueuePool,
            json_serializer=lambda value: orjson.dumps(value).decode(),
            json_deserializer=orjson.loads,
            connect_args={"timeout": self._seconds, "check_same_thread": False},
        )

        def on_connect(connection: Any, _record: object) -> None:
            # The driver would begin by itself, and only at the first change: two that have read could not both write.
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if self._writes(connection) else "BEGIN")

        event.listen(engine, "connect", on_connect)
        event.listen(engine, "begin", on_begin)
        return engine

    def _writes(self, connection: Connection) -> bool:
        return not connection.get_execution_options().get("reads", False)

    def alone(self, _connection: Connection, _what: str) -> None:
        """See `Dialect.alone`: BEGIN IMMEDIATE lets in one at a time."""

    def come_back(self) -> str:
        """See `Dialect.come_back`."""
        return "See whether the disk is full, the file may be written, and who else holds it."

    def unhurried(self, _connection: Connection) -> None:
        """See `Dialect.unhurried`: nothing hurries them."""

    @contextmanager
    def builder(self) -> Iterator[bool]:
        """See `Store.builder`: a lock on a file beside it, which goes with the process."""
        # A model's name may have what a file's cannot.
        name = blake2b(self.declared.name.encode(), digest_size=8).hexdigest()
        file = self._path.with_name(f"{self._path.name}.rebuild-{name}")
        with file.open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def among(self, column: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
        """See `Dialect.among`."""
        process = column.type.dialect_impl(sqlite.dialect()).bind_processor(sqlite.dialect())
        stored = [value if process is None else process(value) for value in values]
        listed = func.json_each(bindparam(None, orjson.dumps(stored).decode())).table_valued("value")
        return column.in_(select(listed.c.value))

    def blame(self, error: BaseException) -> Blame:
        """See `Dialect.blame`."""
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            return "values"  # the driver's own: what it was given is no value of its
        # The lower byte says what it is, the others which of these.
        return "moment" if code & 0xFF in _OF_A_MOMENT else "values" if code & 0xFF in _OF_VALUES else "setting"

    def cure(self, error: BaseException) -> str:
        """See `Dialect.cure`."""
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            return "Correct the path: that file is no database of SQLite's."
        return "Migrate the service's database: its tables are not what the read model declares."

    def has_equality(self, _column: Column[Any]) -> bool:
        """See `Dialect.has_equality`."""
        return True
