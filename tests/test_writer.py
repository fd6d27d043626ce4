"""The explicit writer: one call on whatever the service has, in the service's own transaction."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import psycopg
import pytest
import sqlalchemy as sa
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from psycopg.rows import dict_row
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import outbox
from outbox.errors import (
    ConfigError,
    EntryError,
    EntryKeyError,
    HeadersError,
    OutboxError,
    SchemaError,
    StateError,
    StateTooLargeError,
    UnknownTypeError,
)

pytestmark = pytest.mark.postgres


def sqlalchemy_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
def database(outbox_database: str) -> str:
    """A database with the types customer (states up to 100 bytes) and order."""
    with psycopg.connect(outbox_database) as connection:
        connection.execute(
            "INSERT INTO outbox.entity_types (name, topic, max_bytes) VALUES ('customer', 'customer', 100), "
            "('order', 'order', 1000000)"
        )
    return outbox_database


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(sqlalchemy_url(database))
    yield engine
    engine.dispose()


def entries(url: str, columns: str = "type, key, state") -> list[tuple[Any, ...]]:
    """What is committed, in id order."""
    with psycopg.connect(url) as connection:
        return connection.execute(f"SELECT {columns} FROM outbox.entries ORDER BY id").fetchall()


# -- every kind of connection ---------------------------------------------------------------------------------------


class Path(Protocol):
    """One way to write: the same four calls, whatever is below."""

    def put(self, *args: Any, **options: Any) -> Any: ...
    def savepoint(self) -> Any: ...
    def end(self, *, commit: bool) -> None: ...


class SyncPath:
    """A Session or Connection of SQLAlchemy."""

    def __init__(self, where: Any) -> None:
        self.where = where

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(self.where, *args, **options)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        inner = self.where.begin_nested()
        yield
        inner.rollback()

    def end(self, *, commit: bool) -> None:
        (self.where.commit if commit else self.where.rollback)()


class PsycopgPath(SyncPath):
    @contextmanager
    def savepoint(self) -> Iterator[None]:
        with self.where.transaction() as inner:
            yield
            raise psycopg.Rollback(inner)


class AsyncPath:
    """The asyncio forms, one event loop for the whole of it."""

    def __init__(self, runner: asyncio.Runner, where: Any) -> None:
        self.runner = runner
        self.where = where

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self.runner.run(function(self.where, *args, **options))

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        async def begin() -> Any:
            return await self.where.begin_nested()

        inner = self.runner.run(begin())
        yield
        self.runner.run(inner.rollback())

    def end(self, *, commit: bool) -> None:
        self.runner.run((self.where.commit if commit else self.where.rollback)())


class AsyncPsycopgPath(AsyncPath):
    @contextmanager
    def savepoint(self) -> Iterator[None]:
        self.runner.run(self.where.execute("SAVEPOINT here"))
        yield
        self.runner.run(self.where.execute("ROLLBACK TO SAVEPOINT here"))


@pytest.fixture(
    params=["session", "scoped_session", "connection", "async_session", "async_connection", "psycopg", "psycopg_async"]
)
def path(request: pytest.FixtureRequest, database: str, engine: sa.Engine) -> Iterator[Any]:
    """Each kind of connection that the writer takes, in an open transaction."""
    match request.param:
        case "session":
            with orm.Session(engine) as session:
                yield SyncPath(session)
        case "scoped_session":
            registry = orm.scoped_session(orm.sessionmaker(engine))
            yield SyncPath(registry)
            registry.remove()
        case "connection":
            with engine.connect() as connection:
                yield SyncPath(connection)
        case "psycopg":
            with psycopg.connect(database, row_factory=dict_row) as plain:
                yield PsycopgPath(plain)
        case "psycopg_async":
            with asyncio.Runner() as runner:
                plain_async = runner.run(psycopg.AsyncConnection.connect(database))
                yield AsyncPsycopgPath(runner, plain_async)
                runner.run(plain_async.close())
        case _:
            with asyncio.Runner() as runner:
                async_engine = create_async_engine(sqlalchemy_url(database))
                where: Any
                if request.param == "async_session":
                    where = AsyncSession(async_engine)
                else:
                    where = runner.run(_started(async_engine.connect()))
                yield AsyncPath(runner, where)
                runner.run(where.close())
                runner.run(async_engine.dispose())


async def _started(connection: Any) -> Any:
    return await connection


def test_an_entry_commits_with_the_transaction(path: Any, database: str) -> None:
    """put and delete return the entry's id and send nothing else; the caller commits."""
    ids = [
        path.call(outbox.put, "customer", 7, {"name": "Ada"}, cause="moved", headers={"tenant": "1"}),
        path.call(outbox.put, "order", ("acme", 1), b"\x00\xff", content_type="application/avro"),
        path.call(outbox.delete, "customer", 7),
    ]
    assert entries(database) == []
    path.end(commit=True)
    assert entries(database, "id, type, key, state, content_type, cause, headers") == [
        (ids[0], "customer", "7", b'{"name":"Ada"}', None, "moved", {"tenant": "1"}),
        (ids[1], "order", "acme:1", b"\x00\xff", "application/avro", None, None),
        (ids[2], "customer", "7", None, None, None, None),
    ]


def test_an_entry_rolls_back_with_the_transaction(path: Any, database: str) -> None:
    """The writer never commits."""
    path.call(outbox.put, "customer", 7, {"name": "Ada"})
    path.call(outbox.put_many, "customer", [(8, {}), (9, {})])
    path.end(commit=False)
    assert entries(database) == []


def test_an_entry_rolls_back_with_the_savepoint(path: Any, database: str) -> None:
    """What was written before the savepoint and after it stays."""
    path.call(outbox.put, "customer", 1, {})
    with path.savepoint():
        path.call(outbox.put, "customer", 2, {})
        path.call(outbox.put_many, "customer", [(3, {})])
    path.call(outbox.put, "customer", 4, {})
    path.end(commit=True)
    assert [key for _, key, _ in entries(database)] == ["1", "4"]


def test_many_entries_in_one_call_keep_their_order(path: Any, database: str) -> None:
    """Pairs, entries with a cause of their own, tombstones; the ids come in the order of the items."""
    ids = path.call(
        outbox.put_many,
        "customer",
        [
            ("b", {"n": 1}),
            ("a", {"n": 2}),
            outbox.NewEntry("a", b"\x00", cause="own", headers={"own": "1"}, content_type="application/avro"),
            outbox.NewEntry.tombstone("b"),
        ],
        cause="bulk",
    )
    path.end(commit=True)
    assert entries(database, "id, key, state, content_type, cause, headers") == [
        (ids[0], "b", b'{"n":1}', None, "bulk", None),
        (ids[1], "a", b'{"n":2}', None, "bulk", None),
        (ids[2], "a", b"\x00", "application/avro", "own", {"own": "1"}),
        (ids[3], "b", None, None, "bulk", None),
    ]
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("nothing", 1, {}), {}, UnknownTypeError),
        (("customer", "", {}), {}, EntryKeyError),
        (("customer", "k" * 1025, {}), {}, EntryKeyError),
        (("customer", 1, {"n": float("nan")}), {}, StateError),
        (("customer", 1, None), {}, StateError),
        (("customer", 1, {"text": "x" * 100}), {}, StateTooLargeError),
        (("customer", 1, {}), {"headers": {"outbox-id": "1"}}, HeadersError),
        (("customer", 1, {}), {"headers": {"n": 1}}, HeadersError),
        (("customer", 1, {}), {"headers": {"n": "\x00"}}, HeadersError),
        (("customer", 1, {}), {"cause": 7}, HeadersError),
    ],
)
def test_bad_input_is_refused_and_the_transaction_goes_on(
    path: Any, database: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[OutboxError]
) -> None:
    """Each error names the entity and the cure, and is raised before the server is asked to do it."""
    with pytest.raises(error) as caught:
        path.call(outbox.put, *arguments, **options)
    assert arguments[0] in caught.value.message
    assert caught.value.cure
    path.call(outbox.put, "customer", 1, {})
    path.end(commit=True)
    assert len(entries(database)) == 1


def test_the_lock_of_an_entity_excludes_others_until_the_transaction_ends(path: Any, database: str) -> None:
    """Another session cannot take it meanwhile."""
    path.call(outbox.lock, "customer", 7)
    with psycopg.connect(database) as other:
        other.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            outbox.lock(other, "customer", 7)
        other.rollback()
        outbox.lock(other, "customer", 8)
        other.rollback()
        path.end(commit=True)
        outbox.lock(other, "customer", 7)


# -- order and size -------------------------------------------------------------------------------------------------


def test_five_thousand_entries_are_one_statement(engine: sa.Engine, database: str) -> None:
    """The ids are in the order of the items."""
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement))
    with engine.begin() as connection:
        outbox.put(connection, "order", "first", {})
        statements.clear()
        ids = outbox.put_many(connection, "order", ((number * 7919 % 5000, {"n": number}) for number in range(5000)))
    assert len(statements) == 1
    assert ids == sorted(ids)
    assert [state for _, _, state in entries(database)[1:]] == [b'{"n":%d}' % number for number in range(5000)]


def test_a_big_input_is_cut_into_statements(engine: sa.Engine, database: str) -> None:
    """Ten thousand entries each, so that memory stays bounded."""
    with engine.begin() as connection:
        ids = outbox.put_many(connection, "order", ((number, b"{}") for number in range(10_001)))
    assert len(set(ids)) == 10_001
    assert [int(key) for _, key, _ in entries(database)] == list(range(10_001))


def test_no_item_is_no_entry(engine: sa.Engine) -> None:
    """An empty input is nothing special."""
    with engine.begin() as connection:
        assert outbox.put_many(connection, "order", []) == []


def test_a_session_is_flushed_before_the_entry(engine: sa.Engine, database: str) -> None:
    """An entry before the domain write would take its id before the row's lock: the older state would come last."""
    metadata = sa.MetaData()
    table = sa.Table("customers", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text))
    metadata.create_all(engine)

    class Customer:
        id: int
        name: str

    registry = orm.registry(metadata=metadata)
    registry.map_imperatively(Customer, table)
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement))
    with orm.Session(engine, autoflush=False) as session:
        customer = Customer()
        customer.name = "Ada"
        session.add(customer)
        outbox.put(session, "customer", "1", {"name": customer.name})
        session.commit()
    writes = [statement.split()[2] for statement in statements if statement.startswith("INSERT")]
    assert writes == ["customers", '"outbox".entries']
    registry.dispose()


# -- what the transaction must be -----------------------------------------------------------------------------------


def test_autocommit_is_refused_outside_a_transaction(database: str) -> None:
    """There the entry would commit apart from the domain change."""
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(EntryError, match="autocommit"):
            outbox.put(connection, "customer", 1, {})
        with connection.transaction():
            outbox.put(connection, "customer", 1, {})
    assert len(entries(database)) == 1


@pytest.mark.parametrize("where", ["engine", "option"])
def test_autocommit_of_sqlalchemy_is_refused(database: str, where: str) -> None:
    """Set on the engine or on the connection."""
    engine = sa.create_engine(
        sqlalchemy_url(database), **({"isolation_level": "AUTOCOMMIT"} if where == "engine" else {})
    )
    with engine.connect() as connection:
        if where == "option":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(EntryError, match="autocommit"):
            outbox.put(connection, "customer", 1, {})
    engine.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_lock_with_a_snapshot_older_than_it_is_refused(database: str, level: str) -> None:
    """What is read after it may be stale. The server refuses, for callers in SQL, too, and takes no lock."""
    with psycopg.connect(database) as connection, psycopg.connect(database) as other:
        connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        with pytest.raises(EntryError, match=f"under {level}: the snapshot is older.* Use READ COMMITTED"):
            outbox.lock(connection, "customer", 1)
        connection.rollback()
        connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        connection.execute("SAVEPOINT before")
        with pytest.raises(psycopg.Error) as caught:
            connection.execute("SELECT outbox.lock('customer', '1')")
        assert caught.value.sqlstate == "OB006"
        assert "READ COMMITTED" in (caught.value.diag.message_hint or "")
        connection.execute("ROLLBACK TO SAVEPOINT before")
        other.execute("SET lock_timeout = '50ms'")
        outbox.lock(other, "customer", 1)


def test_a_lock_of_sqlalchemy_is_refused_likewise(engine: sa.Engine) -> None:
    """The error that SQLAlchemy wraps becomes the same."""
    with (
        engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection,
        pytest.raises(EntryError, match="under SERIALIZABLE"),
    ):
        outbox.lock(connection, "customer", 1)


def test_a_missing_outbox_names_the_migration_and_leaves_the_transaction_usable(path_without_outbox: Any) -> None:
    """Nothing is sent that the server would answer with an error."""
    with pytest.raises(SchemaError, match="outbox migrate"):
        outbox.put(path_without_outbox, "customer", 1, {})
    path_without_outbox.execute(sa.text("SELECT 1") if isinstance(path_without_outbox, sa.Connection) else "SELECT 1")


@pytest.fixture(params=["connection", "psycopg"])
def path_without_outbox(request: pytest.FixtureRequest, database_url: str) -> Iterator[Any]:
    if request.param == "psycopg":
        with psycopg.connect(database_url) as plain:
            yield plain
    else:
        engine = sa.create_engine(sqlalchemy_url(database_url))
        with engine.connect() as connection:
            yield connection
        engine.dispose()


def test_a_role_without_the_privilege_is_told_to_be_granted_it(database: str) -> None:
    """The driver's error becomes one with a cure."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE ROLE nobody_at_all")
        try:
            connection.execute("SET ROLE nobody_at_all")
            with pytest.raises(OutboxError, match="outbox_grant"):
                outbox.put(connection, "customer", 1, {})
        finally:
            connection.rollback()


def test_what_is_no_connection_is_refused() -> None:
    """With the names of what is taken."""
    with pytest.raises(TypeError, match="SQLAlchemy Session or Connection"):
        outbox.put(object(), "customer", 1, {})  # type: ignore[call-overload]  # that is what the test is about


def test_an_error_of_the_server_passes_as_the_driver_raised_it(engine: sa.Engine, database: str) -> None:
    """Whatever retries a transaction after a deadlock or a serialization failure must still know it."""
    with engine.connect() as connection:
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        with pytest.raises(sa.exc.DBAPIError) as caught:
            outbox.put(connection, "customer", 1, {})
    assert isinstance(caught.value.orig, psycopg.errors.ReadOnlySqlTransaction)


# -- types are loaded once ------------------------------------------------------------------------------------------


def test_types_are_loaded_once_an_engine_and_again_on_a_miss(engine: sa.Engine, database: str) -> None:
    """A new type and a raised limit are seen without a restart."""
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement))

    def put(*arguments: Any) -> int:
        statements.clear()
        with engine.begin() as connection:
            outbox.put(connection, *arguments)
        return len(statements)

    assert put("customer", 1, {}) == 3
    assert put("customer", 1, {}) == 1
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('advert', 'advert')")
        connection.execute("UPDATE outbox.entity_types SET max_bytes = 200 WHERE name = 'customer'")
    assert put("advert", 1, {}) == 3
    assert put("customer", 1, {"text": "x" * 150}) == 1
    assert put("order", 1, {}) == 1


@pytest.mark.parametrize("savepoint", [True, False])
def test_a_type_that_is_rolled_back_is_not_remembered(engine: sa.Engine, database: str, *, savepoint: bool) -> None:
    """The transaction that registers it may use it; the next one is refused, also by put_many."""
    with engine.connect() as connection:
        with connection.begin() as transaction:
            inner = connection.begin_nested() if savepoint else transaction
            connection.exec_driver_sql("INSERT INTO outbox.entity_types (name, topic) VALUES ('ghost', 'ghost')")
            outbox.put(connection, "ghost", 1, {})
            inner.rollback()
        with connection.begin(), pytest.raises(UnknownTypeError, match="ghost"):
            outbox.put(connection, "ghost", 1, {})
    assert entries(database) == []


def test_a_session_that_is_bound_class_by_class_is_told_to_pass_its_connection(engine: sa.Engine) -> None:
    """It does not say which database the entry belongs to."""

    class Base(orm.DeclarativeBase):
        pass

    class Own(Base):
        __tablename__ = "own"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)

    with orm.Session(binds={Own: engine}) as session:
        with pytest.raises(EntryError, match="bind_arguments"):
            outbox.put(session, "customer", 1, {})
        outbox.put(session.connection(bind_arguments={"mapper": Own}), "customer", 1, {})


def test_an_outbox_in_another_schema(make_outbox: Callable[..., str]) -> None:
    """Its name may need quotes, and hold what SQLAlchemy takes for a parameter. What psycopg does, cannot be a name."""
    with pytest.raises(ConfigError, match="without %"):
        make_outbox(schema="100%s")
    schema = 'my "out:box" {x}'
    url = make_outbox(schema=schema)
    with psycopg.connect(url) as connection:
        quoted = psycopg.sql.Identifier(schema).as_string(connection)
        connection.execute(f"INSERT INTO {quoted}.entity_types (name, topic) VALUES ('customer', 'c')".encode())
        outbox.put(connection, "customer", 1, {}, schema=schema)
    engine = sa.create_engine(sqlalchemy_url(url))
    with engine.begin() as other:
        outbox.put_many(other, "customer", [(2, {})], schema=schema)
        outbox.lock(other, "customer", 2, schema=schema)
        assert other.exec_driver_sql(f"SELECT count(*) FROM {quoted}.entries").scalar() == 2
    engine.dispose()


# -- cause, headers, trace -------------------------------------------------------------------------------------------

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER_TRACE = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def test_a_block_of_work_gives_its_entries_cause_trace_and_headers(engine: sa.Engine, database: str) -> None:
    """What a call says itself goes before; an inner block adds to the outer one; nothing is left after it."""
    with engine.begin() as connection:
        with outbox.context(cause="import", traceparent=TRACE, headers={"a": "1"}):
            outbox.put(connection, "customer", 1, {})
            outbox.put(connection, "customer", 2, {}, cause="own", headers={"a": "2"})
            with outbox.context(cause="inner", headers={"b": "3"}):
                outbox.put_many(connection, "customer", [(3, {})])
        outbox.put(connection, "customer", 4, {})
    assert entries(database, "key, cause, headers") == [
        ("1", "import", {"a": "1", "traceparent": TRACE}),
        ("2", "own", {"a": "2", "traceparent": TRACE}),
        ("3", "inner", {"a": "1", "b": "3", "traceparent": TRACE}),
        ("4", None, None),
    ]


def test_blocks_of_work_of_concurrent_tasks_are_apart(database: str) -> None:
    """Each asyncio task has its own."""

    async def write(connection: psycopg.AsyncConnection[Any], key: int, barrier: asyncio.Barrier) -> None:
        with outbox.context(cause=f"task {key}"):
            await barrier.wait()
            await outbox.put(connection, "customer", key, {})

    async def both() -> None:
        barrier = asyncio.Barrier(2)
        async with await psycopg.AsyncConnection.connect(database) as connection:
            await asyncio.gather(write(connection, 1, barrier), write(connection, 2, barrier))

    asyncio.run(both())
    assert sorted(entries(database, "key, cause")) == [("1", "task 1"), ("2", "task 2")]


def test_the_current_span_of_opentelemetry_is_taken_by_itself(engine: sa.Engine, database: str) -> None:
    """Unless the call or the block names a trace."""
    tracer = TracerProvider().get_tracer("test")
    with engine.begin() as connection, tracer.start_as_current_span("work") as span:
        outbox.put(connection, "customer", 1, {})
        with outbox.context(traceparent=OTHER_TRACE):
            outbox.put(connection, "customer", 2, {})
    seen = span.get_span_context()
    assert entries(database, "headers") == [
        ({"traceparent": f"00-{seen.trace_id:032x}-{seen.span_id:016x}-{seen.trace_flags:02x}"},),
        ({"traceparent": OTHER_TRACE},),
    ]
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize(
    "wrong", ["", "1", TRACE.upper(), f"ff{TRACE[2:]}", f"00-{'0' * 32}-b7ad6b7169203331-01", f"{TRACE}\n"]
)
def test_a_traceparent_that_is_none_is_refused(wrong: str) -> None:
    """By the grammar of W3C Trace Context."""
    with pytest.raises(HeadersError, match="traceparent"), outbox.context(traceparent=wrong):
        pass


def test_importing_the_package_imports_neither_a_driver_nor_sqlalchemy_nor_kafka() -> None:
    """Nor does the writer, until it is handed something to write to."""
    program = (
        "import sys, outbox; outbox.put, outbox.put_many, outbox.context; "
        "print(sorted({'psycopg', 'sqlalchemy', 'confluent_kafka', 'alembic', 'opentelemetry'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
