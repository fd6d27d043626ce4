"""A read model in PostgreSQL, by psycopg: new rows come in by COPY."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any

import orjson
import psycopg
from sqlalchemy import (
    ARRAY,
    Column,
    Connection,
    Engine,
    Table,
    Text,
    any_,
    cast,
    create_engine,
    event,
    func,
    literal,
    make_url,
    select,
    text,
    types,
)
from sqlalchemy import exc as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.sql.elements import ColumnElement

from outbox.database import is_refused
from outbox.errors import ConfigError
from outbox.read_model.dialect import Blame
from outbox.read_model.rows import Row
from outbox.read_model.sql import SqlStore

# From so many rows on COPY is faster than INSERT.
_COPY_FROM = 32
# And from so many on that are to be replaced, COPY into a table of the transaction's own is.
_STAGE_FROM = 500
_STAGE = "outbox_read_model_stage"
# SQLSTATEs, or their beginnings. Of the moment: connections, resources (a full disk), an operator, a transaction that
# is rolled back, a lock, a server that became a standby.
_OF_A_MOMENT = ("08", "25006", "25P03", "40", "53", "55P03", "57")
# Data, constraints, sizes, and what functions of the server raise.
_OF_VALUES = ("21", "22", "23", "54", "P0")
_CURES = {
    "28": "Correct the user and the password in the store's URL.",
    "3D": "Correct the database in the store's URL, or make it.",
    "42501": "Grant it to the service's role.",
    "42": "Migrate the service's database: its tables are not what the read model declares.",
}
# What the server says of a connection comes without its code.
_REFUSED = {"login": "28", "database": "3D"}
_SECONDS = 30.0
# A millisecond, and as many as the server's integers take: its 0 would switch the limits off.
_LEAST_SECONDS, _MOST_SECONDS = 0.001, 2_147_483.0


class PostgresStore(SqlStore):
    """A read model in the service's own PostgreSQL database.

    `url`: libpq's, or SQLAlchemy's `postgresql+psycopg://`. `schema`: where the books are; the service's tables say it
    themselves. `seconds` (0.001 to 2,147,483): after so long the server ends a transaction whose process does not go
    on, so that another one can; and so long a statement waits for what another transaction has locked, before all of
    its transaction is tried again. `ConfigError` when one of them cannot be used.
    """

    def __init__(self, url: str, *, schema: str | None = None, seconds: float = _SECONDS) -> None:
        super().__init__(postgresql.insert, schema=schema)
        scheme, colon, rest = url.partition("://")
        if not colon or scheme not in {"postgres", "postgresql", "postgresql+psycopg"}:
            raise ConfigError("This is no URL of a PostgreSQL database.", cure="Write postgresql://user@host/database.")
        self._url = f"postgresql+psycopg://{rest}"
        try:
            make_url(self._url)
        except (sa.ArgumentError, ValueError) as error:
            raise ConfigError(
                f"This is no URL of a PostgreSQL database: {error}.", cure="Write postgresql://user@host/database."
            ) from error
        if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
            raise ConfigError(
                f"seconds of a PostgresStore cannot be {seconds!r}.",
                cure=f"Let it be {_LEAST_SECONDS:g} to {_MOST_SECONDS:,.0f}; {_SECONDS:g} is the default.",
            )
        self._seconds = seconds
        self._stages: bool | None = None

    def _connect(self) -> Engine:
        most = round(self._seconds * 1000)
        limits = {
            "idle_in_transaction_session_timeout": most,
            "statement_timeout": max(most, 600_000),
            "lock_timeout": most,
        }
        engine = create_engine(
            self._url,
            # Whatever the database's default is: who has waited for a lock must see what was done meanwhile.
            isolation_level="READ COMMITTED",
            json_serializer=lambda value: orjson.dumps(value).decode(),
            json_deserializer=orjson.loads,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": 10,
                "application_name": "outbox-read-model",
                "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
            },
        )

        def on_error(context: ExceptionContext) -> None:
            # A server that became a standby stays one: its connections are no use any more.
            if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
                context.is_disconnect = True

        event.listen(engine, "handle_error", on_error)
        return engine

    def alone(self, connection: Connection, what: str) -> None:
        """See `Dialect.alone`."""
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._lock_key(what)})

    def unhurried(self, connection: Connection) -> None:
        """See `Dialect.unhurried`."""
        connection.execute(text("SET LOCAL statement_timeout = 0"))

    def _lock_key(self, what: str) -> int:
        digest = blake2b(f"outbox read model {self.declared.name}: {what}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    @contextmanager
    def builder(self) -> Iterator[bool]:
        """See `Store.builder`: a lock of a session, which goes with it."""
        with self.translated(), self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            key = {"key": self._lock_key("rebuild")}
            mine = bool(connection.execute(text("SELECT pg_try_advisory_lock(:key)"), key).scalar())
            try:
                yield mine
            finally:
                # One that was cut meanwhile has given it back.
                with suppress(sa.DBAPIError):
                    if mine and not connection.invalidated:
                        connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)

    def among(self, column: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
        """See `Dialect.among`."""
        if isinstance(column.type, types.String) and not isinstance(column.type, types.Enum):
            # JSON is made faster than an array of texts; and a type with a collation cannot be that of an array.
            given = cast(literal(list(values), postgresql.JSONB), postgresql.JSONB)
            texts = select(func.jsonb_array_elements_text(given)).scalar_subquery()
            return column == any_(func.array(texts, type_=ARRAY(Text)))
        return column == any_(literal(list(values), ARRAY(column.type)))

    def insert_rows(self, connection: Connection, table: Table, names: Sequence[str], rows: Sequence[Row]) -> None:
        """See `Dialect.insert_rows`."""
        if len(rows) < _COPY_FROM:
            super().insert_rows(connection, table, names, rows)
            return
        self._copy(connection, _plain(connection.dialect.identifier_preparer.format_table(table)), table, names, rows)

    def upsert_rows(
        self, connection: Connection, table: Table, names: Sequence[str], key: str, rows: Sequence[Row]
    ) -> None:
        """See `Dialect.upsert_rows`: many go into a table of the transaction's own first."""
        if len(rows) < _STAGE_FROM or not self._may_stage(connection):
            super().upsert_rows(connection, table, names, key, rows)
            return
        prepare = connection.dialect.identifier_preparer
        target, columns = _plain(prepare.format_table(table)), ", ".join(_plain(prepare.quote(name)) for name in names)
        replaced = [
            f"{_plain(prepare.quote(name))} = excluded.{_plain(prepare.quote(name))}" for name in names if name != key
        ]
        then = f"UPDATE SET {', '.join(replaced)}" if replaced else "NOTHING"
        merge = f"INSERT INTO {target} ({columns}) SELECT {columns} FROM pg_temp.{_STAGE}"
        conflict = f"ON CONFLICT ({_plain(prepare.quote(key))}) DO {then}"

        def run(statement: str) -> None:
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})

        run(f"CREATE TEMPORARY TABLE {_STAGE} ON COMMIT DROP AS SELECT {columns} FROM {target} WITH NO DATA")
        self._copy(connection, f"pg_temp.{_STAGE}", table, names, rows)
        run(f"{merge} {conflict}")
        run(f"DROP TABLE pg_temp.{_STAGE}")

    def _may_stage(self, connection: Connection) -> bool:
        """Whether the role may make temporary tables: as a rule everybody may."""
        if self._stages is None:
            asked = text("SELECT has_database_privilege(current_database(), 'TEMPORARY')")
            self._stages = bool(connection.execute(asked).scalar())
        return self._stages

    def _copy(self, connection: Connection, into: str, table: Table, names: Sequence[str], rows: Sequence[Row]) -> None:
        """COPY rows, as the table's types have them, into what is named so."""
        dialect = connection.dialect
        processors = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names]
        columns = ", ".join(_plain(dialect.identifier_preparer.quote(name)) for name in names)
        driver = connection.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            raise TypeError("the engine's driver is not psycopg")
        try:
            with driver.cursor() as cursor, cursor.copy(f"COPY {into} ({columns}) FROM STDIN".encode()) as copy:
                for row in rows:
                    copy.write_row(
                        [value if made is None else made(value) for made, value in zip(processors, row, strict=True)]
                    )
        except psycopg.Error as error:
            raise sa.DBAPIError(None, None, error, connection_invalidated=driver.closed) from error

    def blame(self, error: BaseException) -> Blame:
        """See `Dialect.blame`."""
        state = error.sqlstate if isinstance(error, psycopg.Error) else None
        if state is None:
            # The driver's own: it is not connected, or what it was given is no value of its.
            if isinstance(error, psycopg.Error) and is_refused(error):
                return "setting"
            return "moment" if isinstance(error, psycopg.OperationalError) else "values"
        if state.startswith(_OF_A_MOMENT):
            return "moment"
        return "values" if state.startswith(_OF_VALUES) else "setting"

    def cure(self, error: BaseException) -> str:
        """See `Dialect.cure`."""
        if not isinstance(error, psycopg.Error):
            return "See the server's log."
        state = error.sqlstate or _REFUSED.get(is_refused(error) or "", "")
        return next((cure for start, cure in _CURES.items() if state.startswith(start)), "See the server's log.")

    def has_equality(self, column: Column[Any]) -> bool:
        """See `Dialect.has_equality`."""
        kind = column.type.dialect_impl(self.engine.dialect)
        return not isinstance(kind, types.JSON) or isinstance(kind, postgresql.JSONB)


def _plain(quoted: str) -> str:
    """A quoted name for a statement without parameters: SQLAlchemy doubles the percent signs for those with some."""
    return quoted.replace("%%", "%")
