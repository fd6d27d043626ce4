"""The writer: entries in the caller's own transaction.

Nothing here commits, opens a connection or sleeps. What is asked of the database is decided by generators that yield
requests and are sent rows; three thin edges carry them: psycopg, psycopg with asyncio, SQLAlchemy.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, overload
from weakref import WeakKeyDictionary

import orjson

from outbox.current import in_force
from outbox.errors import DatabaseError, EntryError, OutboxError, SchemaError, StateTooLargeError, UnknownTypeError
from outbox.key import Key, key_text
from outbox.sql import load
from outbox.state import state_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg
    import sqlalchemy as sa
    from sqlalchemy import orm
    from sqlalchemy.ext import asyncio as sa_asyncio

    Sync = orm.Session | orm.scoped_session[Any] | sa.Connection | psycopg.Connection[Any]
    Async = (
        sa_asyncio.AsyncSession
        | sa_asyncio.async_scoped_session[Any]
        | sa_asyncio.AsyncConnection
        | psycopg.AsyncConnection[Any]
    )

T = TypeVar("T")

# One statement of put_many: enough rows that the round trip does not count, few enough bytes that neither side's
# memory does.
_CHUNK_ENTRIES = 10_000
_CHUNK_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class NewEntry:
    """An entry to be written by `put_many`, with a cause, headers or content type of its own.

    `NewEntry.tombstone(key)` says that the entity is deleted.
    """

    key: Key
    state: object
    cause: str | None = None
    headers: Mapping[str, str] | None = None
    content_type: str | None = None
    deleted: bool = False

    @classmethod
    def tombstone(cls, key: Key, *, cause: str | None = None, headers: Mapping[str, str] | None = None) -> Self:
        """The entity is deleted."""
        return cls(key, None, cause, headers, deleted=True)


@overload
def put(
    where: Sync,
    type: str,
    key: Key,
    state: object,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> int: ...
@overload
def put(
    where: Async,
    type: str,
    key: Key,
    state: object,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> Coroutine[Any, Any, int]: ...
def put(
    where: Sync | Async,
    type: str,
    key: Key,
    state: object,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> int | Coroutine[Any, Any, int]:
    """Publish an entity's full current state, in the transaction of `where`; the entry's id.

    **When to read the state**: after the entity's row was locked (an UPDATE, or SELECT ... FOR UPDATE), in a *later*
    statement; and call this after the domain write. Else another transaction's change may be missing from the last
    state that is published, for good. A service that has no row to lock calls `lock` first. docs/writing.md has more.

    - `where`: a SQLAlchemy `Session` or `Connection` or a psycopg `Connection`, or one of their asyncio forms: then
      the call must be awaited. A session is flushed first, so that the domain write comes before the entry.
    - `type`: the name of a registered entity type. `key`: see `outbox.key.key_text`.
    - `state`: what `outbox.state.state_bytes` takes: anything that JSON can hold, or bytes, which pass untouched.
    - `cause`: why the state changed. `headers`: further headers of the message, text by text. Both may be set for a
      block of work with `context`.
    - `content_type`: of a state that is no JSON; None means JSON.

    Raises `UnknownTypeError`, `EntryKeyError`, `StateError`, `StateTooLargeError`, `HeadersError` before anything is
    sent, so the transaction goes on; `EntryError` for a connection in autocommit mode; `SchemaError` when the outbox
    is not there. Other errors of the driver pass as they are: what retries a transaction must still know them.
    """
    entry = _entry(type, NewEntry(key, state, cause, headers, content_type))
    return _carry(where, lambda types: _put(types, type, entry, schema), flush=True)


@overload
def delete(
    where: Sync,
    type: str,
    key: Key,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    schema: str = "outbox",
) -> int: ...
@overload
def delete(
    where: Async,
    type: str,
    key: Key,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    schema: str = "outbox",
) -> Coroutine[Any, Any, int]: ...
def delete(
    where: Sync | Async,
    type: str,
    key: Key,
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    schema: str = "outbox",
) -> int | Coroutine[Any, Any, int]:
    """Publish that an entity is deleted (a tombstone); the entry's id. Call it after the domain's DELETE.

    Arguments and errors as in `put`.
    """
    entry = _entry(type, NewEntry.tombstone(key, cause=cause, headers=headers))
    return _carry(where, lambda types: _put(types, type, entry, schema), flush=True)


@overload
def put_many(
    where: Sync,
    type: str,
    items: Iterable[tuple[Key, object] | NewEntry],
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> list[int]: ...
@overload
def put_many(
    where: Async,
    type: str,
    items: Iterable[tuple[Key, object] | NewEntry],
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> Coroutine[Any, Any, list[int]]: ...
def put_many(
    where: Sync | Async,
    type: str,
    items: Iterable[tuple[Key, object] | NewEntry],
    *,
    cause: str | None = None,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = None,
    schema: str = "outbox",
) -> list[int] | Coroutine[Any, Any, list[int]]:
    """Publish many entities of one type in one statement (one for each 10,000 entries or 16 MB); the ids, in order.

    `items`: pairs of key and state, or `NewEntry` for a cause, headers or content type of its own and for tombstones;
    any iterable, read as it is sent. What an item leaves out is taken from the arguments. Read the states after the
    rows were locked, as for `put`.

    Arguments and errors as in `put`. When a later chunk is refused, the earlier ones are in the transaction: roll
    back to a savepoint to go on without them.
    """

    def filled() -> Iterator[NewEntry]:
        for item in items:
            if not isinstance(item, NewEntry):
                yield NewEntry(item[0], item[1], cause, headers, content_type)
            else:
                yield NewEntry(
                    item.key,
                    item.state,
                    cause if item.cause is None else item.cause,
                    headers if item.headers is None else item.headers,
                    content_type if item.content_type is None else item.content_type,
                    item.deleted,
                )

    return _carry(where, lambda types: _put_many(types, type, filled(), schema), flush=True)


@overload
def lock(where: Sync, type: str, key: Key, *, schema: str = "outbox") -> None: ...
@overload
def lock(where: Async, type: str, key: Key, *, schema: str = "outbox") -> Coroutine[Any, Any, None]: ...
def lock(where: Sync | Async, type: str, key: Key, *, schema: str = "outbox") -> Coroutine[Any, Any, None] | None:
    """Lock an entity until the transaction ends, for services that have no row to lock.

    Take it first, *then* read the state in a later statement, then `put`. Whoever else calls `lock` for the same
    entity waits. `ROLLBACK TO SAVEPOINT` gives it back together with what was written after it.

    Raises `EntryKeyError`; under REPEATABLE READ and SERIALIZABLE `EntryError`, and the transaction has failed then:
    there the snapshot is older than the lock, and what is read after it may be stale.
    """
    text = key_text(type, key)
    return _carry(where, lambda _: _lock(type, text, schema), flush=False)


# -- what is asked: no driver here -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """A statement for the server: a query of `sql/writer.sql`, the schema, the parameters."""

    query: str
    schema: str
    parameters: Mapping[str, object]


Rows = Sequence[Sequence[Any]]
Steps = Generator[Request, Rows, T]
"""Yields requests, is sent their rows, returns the result."""

Types = dict[str, dict[str, int]]
"""By schema: the entity types that were seen, with the greatest size of a state in bytes."""


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    state: bytes | None
    content_type: str | None
    cause: str | None
    headers: str | None


def _entry(type: str, new: NewEntry) -> _Row:
    """Check everything that needs no server. Raises the children of `EntryError`."""
    key = key_text(type, new.key)
    cause, headers = in_force(new.cause, new.headers, f'{type} "{key}"')
    state = None if new.deleted else state_bytes(type, key, new.state)
    return _Row(
        key,
        state,
        None if new.deleted else new.content_type,
        cause,
        None if headers is None else orjson.dumps(headers).decode(),
    )


def _put(types: Types, type: str, row: _Row, schema: str) -> Steps[int]:
    yield from _check(types, type, [row], schema)
    rows = yield Request(
        "put",
        schema,
        {
            "type": type,
            "key": row.key,
            "state": row.state,
            "content_type": row.content_type,
            "cause": row.cause,
            "headers": row.headers,
        },
    )
    return cast("int", rows[0][0])


def _put_many(types: Types, type: str, new: Iterable[NewEntry], schema: str) -> Steps[list[int]]:
    ids: list[int] = []
    for chunk in _chunks(_entry(type, item) for item in new):
        yield from _check(types, type, chunk, schema)
        rows = yield Request(
            "put_many",
            schema,
            {
                "type": type,
                "keys": [row.key for row in chunk],
                "states": [row.state for row in chunk],
                "content_types": [row.content_type for row in chunk],
                "causes": [row.cause for row in chunk],
                "headers": [row.headers for row in chunk],
            },
        )
        ids += [row[0] for row in rows]
    return ids


def _lock(type: str, key: str, schema: str) -> Steps[None]:
    yield Request("lock", schema, {"type": type, "key": key})


def _chunks(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    chunk: list[_Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.key) + (len(row.state) if row.state else 0)
        if len(chunk) >= _CHUNK_ENTRIES or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check(types: Types, type: str, rows: Sequence[_Row], schema: str) -> Steps[None]:
    """Refuse an unknown type and a state over its limit.

    Types are loaded once; what they would refuse is looked up again, since a type may be new and a limit raised.
    Those that a transaction which changes them sees are not kept.
    """
    largest = max(rows, key=lambda row: len(row.state) if row.state else 0)
    size = len(largest.state) if largest.state else 0
    limit = types.get(schema, {}).get(type)
    if limit is not None and size <= limit:
        return
    # A server without an outbox would answer with an error that ends the transaction: so this is asked before.
    table = {"table": f"{quoted(schema)}.entity_types"}
    if not (yield Request("exists", schema, table))[0][0]:
        raise _no_outbox(schema)
    rows_of_types = yield Request("types", schema, table)
    known: dict[str, int] = {row[0]: row[1] for row in rows_of_types}
    # A type of the caller's own transaction may be rolled back: it is good for this call, and not remembered.
    if not any(row[2] for row in rows_of_types):
        types[schema] = known
    limit = known.get(type)
    if limit is None:
        raise UnknownTypeError(
            f'The entity type "{type}" is not registered in {schema} (key "{rows[0].key}").',
            cure="Register it in a migration (op.outbox_add_type) or with: outbox types add NAME --topic TOPIC.",
        )
    if size > limit:
        raise StateTooLargeError(
            f'The state of {type} "{largest.key}" has {size} bytes, its type allows {limit}.',
            cure=f"Make the state smaller, or raise the limit: outbox types change {type} --max-bytes N, then: outbox "
            "topics apply.",
        )


def _no_outbox(schema: str) -> SchemaError:
    return SchemaError(
        f'There is no outbox in the schema "{schema}" of this database.',
        cure="Create it: outbox revision and alembic upgrade head, or, in a service without Alembic, outbox migrate "
        "--name NAME. An outbox in another schema is passed as schema=...",
    )


def quoted(identifier: str) -> str:
    """An identifier of PostgreSQL in double quotes."""
    return '"' + identifier.replace('"', '""') + '"'


def quoted_in_text(identifier: str) -> str:
    """The same within what SQLAlchemy's text() is given, which takes a colon before a word for a parameter."""
    return re.sub(r":(?=\w)", r"\\:", quoted(identifier))


# -- the edges -------------------------------------------------------------------------------------------------------

# By what stands for a database: a psycopg connection, or the dialect of an engine (engines that differ in their
# execution options share it).
_types: WeakKeyDictionary[Any, Types] = WeakKeyDictionary()


def _types_of(owner: object) -> Types:
    types = _types.get(owner)
    if types is None:
        types = _types.setdefault(owner, {})
    return types


def _carry(where: object, steps: Callable[[Types], Steps[T]], *, flush: bool) -> T | Coroutine[Any, Any, T]:
    """Run the steps on whatever the caller passed. A class that was never imported cannot be the class of it."""
    if (psycopg := sys.modules.get("psycopg")) is not None:
        if isinstance(where, psycopg.Connection):
            return _on_psycopg(where, steps)
        if isinstance(where, psycopg.AsyncConnection):
            return _on_psycopg_async(where, steps)
    if (sa := sys.modules.get("sqlalchemy")) is not None and isinstance(where, sa.Connection):
        return on_connection(where, steps)
    if (orm := sys.modules.get("sqlalchemy.orm")) is not None:
        if isinstance(where, orm.scoped_session):
            where = where()
        if isinstance(where, orm.Session):
            return _on_session(where, steps, flush=flush)
    if (sa_asyncio := sys.modules.get("sqlalchemy.ext.asyncio")) is not None:
        if isinstance(where, sa_asyncio.async_scoped_session):
            where = where()
        if isinstance(where, sa_asyncio.AsyncSession):
            return cast(
                "Coroutine[Any, Any, T]", where.run_sync(lambda session: _on_session(session, steps, flush=flush))
            )
        if isinstance(where, sa_asyncio.AsyncConnection):
            return cast("Coroutine[Any, Any, T]", where.run_sync(lambda connection: on_connection(connection, steps)))
    raise TypeError(
        f"outbox writes to a SQLAlchemy Session or Connection or a psycopg Connection, or one of their asyncio forms, "
        f"not to a {where.__class__.__module__}.{where.__class__.__qualname__}."
    )


def _on_session(session: orm.Session, steps: Callable[[Types], Steps[T]], *, flush: bool) -> T:
    if flush:
        # An entry that is inserted before the domain write takes its id before the row's lock.
        session.flush()
    from sqlalchemy.exc import UnboundExecutionError

    try:
        connection = session.connection()
    except UnboundExecutionError as error:
        raise EntryError(
            "The session is bound class by class (binds=): it does not say which database the entry belongs to.",
            cure="Flush it, and pass the connection of the entity's class: "
            'session.connection(bind_arguments={"mapper": Customer}).',
        ) from error
    return on_connection(connection, steps)


def on_connection(connection: sa.Connection, steps: Callable[[Types], Steps[T]]) -> T:
    """Run the steps on a connection of SQLAlchemy, whatever its driver."""
    driver = connection.connection.dbapi_connection
    if getattr(driver, "autocommit", False):
        raise _autocommit()
    generator = steps(_types_of(connection.dialect))
    try:
        request = next(generator)
        while True:
            with _translated(request.schema):
                rows = connection.execute(_sqlalchemy_text(request.query, request.schema), request.parameters).all()
            request = generator.send(rows)
    except StopIteration as done:
        return cast("T", done.value)


def _on_psycopg(connection: psycopg.Connection[Any], steps: Callable[[Types], Steps[T]]) -> T:
    import psycopg
    from psycopg.rows import tuple_row

    _refuse_autocommit(connection)
    generator = steps(_types_of(connection))
    try:
        request = next(generator)
        while True:
            # Not connection.cursor(): the service may have chosen a cursor class and a row factory of its own.
            with _translated(request.schema), psycopg.Cursor(connection, row_factory=tuple_row) as cursor:
                cursor.execute(_psycopg_text(request.query, request.schema), request.parameters)
                rows = cursor.fetchall()
            request = generator.send(rows)
    except StopIteration as done:
        return cast("T", done.value)


async def _on_psycopg_async(connection: psycopg.AsyncConnection[Any], steps: Callable[[Types], Steps[T]]) -> T:
    import psycopg
    from psycopg.rows import tuple_row

    _refuse_autocommit(connection)
    generator = steps(_types_of(connection))
    try:
        request = next(generator)
        while True:
            with _translated(request.schema):
                async with psycopg.AsyncCursor(connection, row_factory=tuple_row) as cursor:
                    await cursor.execute(_psycopg_text(request.query, request.schema), request.parameters)
                    rows = await cursor.fetchall()
            request = generator.send(rows)
    except StopIteration as done:
        return cast("T", done.value)


def _refuse_autocommit(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    from psycopg.pq import TransactionStatus

    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise _autocommit()


def _autocommit() -> EntryError:
    return EntryError(
        "The connection is in autocommit mode: the entry would not be in the transaction of the domain change.",
        cure="Write both inside one transaction: with connection.transaction() (psycopg), or without "
        'isolation_level="AUTOCOMMIT" (SQLAlchemy).',
    )


@cache
def _psycopg_text(query: str, schema: str) -> bytes:
    # Bytes: psycopg's types allow a text only when it is a literal, so that none is assembled from input.
    return load("writer")[query].replace("{schema}", quoted(schema)).encode()


@cache
def _sqlalchemy_text(query: str, schema: str) -> sa.TextClause:
    import sqlalchemy as sa

    text = re.sub(r"%\((\w+)\)s", r":\1", load("writer")[query])
    return sa.text(text.replace("{schema}", quoted_in_text(schema)))


@contextmanager
def _translated(schema: str) -> Iterator[None]:
    """Errors that say that the outbox is missing or closed become the project's; all others pass."""
    try:
        yield
    except OutboxError:
        raise
    except Exception as error:
        driver = getattr(error, "orig", None) or error
        sqlstate = getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)
        if sqlstate in {"42P01", "3F000", "42883"}:
            raise _no_outbox(schema) from error
        if sqlstate == "OB006":
            # The server's words: what happened, and the hint, which is the cure.
            diagnosis = getattr(driver, "diag", None)
            raise EntryError(
                f"{getattr(diagnosis, 'message_primary', None) or driver}.",
                cure=getattr(diagnosis, "message_hint", None) or "",
            ) from error
        if sqlstate == "42501":
            raise DatabaseError(
                f'PostgreSQL denied writing to the outbox in the schema "{schema}": {driver}',
                cure="Grant the role what a writer needs: op.outbox_grant(...) in a migration, or outbox migrate "
                "--writer ROLE.",
            ) from error
        raise
