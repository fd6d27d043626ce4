"""Both stores pass the suite that every store has to pass; and what is pure of a read model."""

from __future__ import annotations

import datetime as dt
import math
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import closing, contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from alembic.autogenerate import produce_migrations
from alembic.operations.ops import DropTableOp
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    Sequence,
    Table,
    Text,
    Uuid,
    make_url,
    select,
    text,
    update,
)

import outbox.operations
import outbox.read_model.operations  # noqa: F401  autogenerate knows of both: an owner may have read models as well
from outbox.errors import ConfigError, SchemaError, StoreError, StoreUnavailableError
from outbox.kafka.subscription import Bounds, Place
from outbox.read_model import (
    Columns,
    Copy,
    Follow,
    Function,
    PostgresStore,
    ReadModel,
    SqliteStore,
    Tables,
    consumer,
    copy_table,
)
from outbox.read_model.change import Bad, Change, Raw, decide, decode_json, read
from outbox.read_model.conformance import COPY, DECLARED, FOLLOWS, METADATA, OWN, MakeStore, StoreConformance, put
from outbox.read_model.conformance import change as made
from outbox.read_model.consumer import Settings
from outbox.read_model.currency import Currency
from outbox.read_model.declared import Declared
from outbox.read_model.rebuild import Rebuild
from outbox.read_model.rows import maker
from outbox.read_model.sql import SqlStore
from outbox.read_model.store import RefusedError
from outbox.read_model.tables import shadow_name, shadows_of
from outbox.wake import Wake
from relays import eventually
from test_read_model_units import Log


def run(store: SqlStore, statement: str) -> None:
    """Execute a statement of the service's."""
    with store.engine.begin() as connection:
        connection.exec_driver_sql(statement)


def refer(store: SqlStore) -> None:
    """Refer to a row."""
    run(store, "CREATE TABLE refers (key text REFERENCES conform_own)")
    run(store, "INSERT INTO refers VALUES ('a')")


class TestSqlite(StoreConformance):
    """A file."""

    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        return lambda: SqliteStore(tmp_path / "model.db")

    @pytest.fixture
    def refuse_deletions(self) -> Callable[[SqlStore], None]:
        return lambda store: run(
            store, "CREATE TRIGGER kept BEFORE DELETE ON conform_own BEGIN SELECT RAISE(ABORT, 'it is kept'); END"
        )


@pytest.mark.postgres
class TestPostgres(StoreConformance):
    """A database of its own."""

    @pytest.fixture
    def make_store(self, database_url: str) -> MakeStore:
        return lambda: PostgresStore(database_url)

    @pytest.fixture
    def refuse_deletions(self) -> Callable[[SqlStore], None]:
        return refer


@pytest.mark.postgres
class TestPostgresInASchema(StoreConformance):
    """With the books in another schema than the tables."""

    @pytest.fixture
    def make_store(self, database_url: str) -> MakeStore:
        import psycopg

        with psycopg.connect(database_url) as connection:
            connection.execute("CREATE SCHEMA books")
        return lambda: PostgresStore(database_url, schema="books")

    @pytest.fixture
    def refuse_deletions(self) -> Callable[[SqlStore], None]:
        return refer


def counting(*key: Column[Any]) -> Function:
    return Function(lambda _tables, _changes: None, writes=[Table("counting", MetaData(), *key)])


def change(key: str, state: Any, entry_id: int, *, offset: int = 0) -> Change | Bad:
    value = None if state is None else state if isinstance(state, bytes) else orjson.dumps(state)
    headers = [("outbox-id", b"%d" % entry_id)]
    return read(Raw(0, offset, 1_700_000_000_000, key.encode(), value, headers), decode_json)


@pytest.mark.parametrize(
    ("ids", "held", "counts", "then"),
    [
        ([1, 2, 3], None, 3, 3),
        ([5, 4, 3], None, 5, 5),
        ([5, 4, 0], None, 0, 5),
        ([0, 5, 4], None, 5, 5),
        ([4, 0, 3], 4, 0, 4),
        ([4, 3], 4, None, None),
        ([4, 5], 4, 5, 5),
        ([0], None, 0, 0),
        ([0], 9, 0, 9),
    ],
)
def test_a_record_counts_that_is_newer_or_comes_from_no_entry(
    ids: list[int], held: int | None, counts: int | None, then: int | None
) -> None:
    """The last of those that count is applied; the greatest id is held; an older one changes nothing."""
    decided = decide([change("k", {"id": n}, n) for n in ids], {} if held is None else {"k": held})
    assert (decided.apply["k"].entry_id if counts is not None else None) == counts
    assert ("k" in decided.apply) == (counts is not None)
    assert decided.held.get("k") == then


def test_a_bad_record_is_parked_unless_a_later_one_supersedes_it() -> None:
    """What came before it is applied; one that is older than what is held is nothing."""
    decided = decide([change("k", {"a": 1}, 1), change("k", b"rubbish", 2)], {})
    assert (decided.apply["k"].entry_id, decided.park["k"].entry_id) == (1, 2)
    decided = decide([change("k", b"rubbish", 2), change("k", {"a": 1}, 3)], {})
    assert (decided.apply["k"].entry_id, decided.park) == (3, {})
    decided = decide([change("k", b"rubbish", 2)], {"k": 2})
    assert (decided.apply, decided.park) == ({}, {})


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (Raw(0, 0, 0, None, b"{}", []), "it has no key"),
        (Raw(0, 0, 0, b"", b"{}", []), "it has no key"),
        (Raw(0, 0, 0, b"\xff", b"{}", []), "UnicodeDecodeError"),
        (Raw(0, 0, 0, b"k", b"{", []), "JSONDecodeError"),
        (Raw(0, 0, 0, b"k", b"{}", [("content-type", b"application/avro")]), "no decode= is given"),
    ],
)
def test_a_record_that_cannot_be_read_says_why(raw: Raw, why: str) -> None:
    """And is no change."""
    found = read(raw, decode_json)
    assert isinstance(found, Bad)
    assert why in found.reason


def test_columns_have_values_of_their_types() -> None:
    """By member, by a member within one, converted, by a function; what is missing is null."""
    table = Table(
        "typed", MetaData(),
        Column("id", BigInteger, primary_key=True), Column("name", Text), Column("city", Text),
        Column("price", Numeric(12, 2)), Column("born", Date), Column("at", DateTime(timezone=True)),
        Column("ref", Uuid), Column("size", BigInteger), Column("shout", Text),
        Column("entry_id", BigInteger), Column("updated_at", DateTime(timezone=True)),
    )  # fmt: skip
    into = Columns(
        table,
        {
            "name": "name", "city": "address.city", "price": "price", "born": "born", "at": "at", "ref": "ref",
            "size": ("words", len), "shout": lambda change: change.state["name"].upper(),
        },
        key="id",
    )  # fmt: skip
    state = {
        "name": "a", "address": {"city": "b"}, "price": 0.1, "born": "2026-01-02", "at": "2026-01-02T03:04:05Z",
        "ref": "12345678-1234-5678-1234-567812345678", "words": [1, 2, 3],
    }  # fmt: skip
    one = change("7", state, 5)
    assert isinstance(one, Change)
    row = dict(zip(into.columns, maker(into)(one, 5), strict=True))
    assert row["id"] == 7
    assert (row["name"], row["city"], row["price"], row["size"], row["shout"]) == ("a", "b", Decimal("0.1"), 3, "A")
    assert row["born"] == dt.date(2026, 1, 2)
    assert row["at"] == dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert (row["entry_id"], row["updated_at"]) == (5, dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=dt.UTC))
    bare = change("8", {"name": "a"}, 6)
    assert isinstance(bare, Change)
    assert dict(zip(into.columns, maker(into)(bare, 6), strict=True))["city"] is None


@pytest.mark.parametrize("wrong", [{"size": 1.5}, {"size": "x"}, {"name": 5}, {"born": "yesterday"}])
def test_a_value_that_is_none_of_the_columns_type_is_an_error(wrong: dict[str, Any]) -> None:
    """Nothing is cut or guessed."""
    table = Table(
        "typed", MetaData(), Column("key", Text, primary_key=True), Column("size", BigInteger), Column("name", Text),
        Column("born", Date),
    )  # fmt: skip
    one = change("7", wrong, 5)
    assert isinstance(one, Change)
    with pytest.raises((TypeError, ValueError)):
        maker(Columns(table, {"size": "size", "name": "name", "born": "born"}))(one, 5)


def test_another_mapping_has_another_fingerprint() -> None:
    """Columns, types, members, versions, topics; the order in which topics are named says nothing."""

    def of(*follows: Follow) -> str:
        return Declared("m", follows).fingerprint

    base = Follow("a", Columns(OWN, {"name": "name"}))
    others = [
        Follow("b", Columns(OWN, {"name": "name"})),
        Follow("a", Columns(OWN, {"name": "title"})),
        Follow("a", Columns(OWN, {"name": "name", "price": "price"})),
        Follow("a", Columns(OWN, {"name": "name"}, version=1)),
        Follow("a", Columns(OWN, {"name": "name"}), version=1),
        Follow("a", Function(lambda _tables, _changes: None, writes=[OWN])),
    ]
    prints = {of(base), *map(of, others)}
    assert len(prints) == len(others) + 1
    copy = Follow("c", Copy(COPY))
    assert of(base, copy) == of(copy, base)


@pytest.mark.parametrize(
    ("declare", "why"),
    [
        (lambda: Declared("m", []), "follows no topic"),
        (lambda: Declared("", [FOLLOWS["copy"]]), "cannot be the name"),
        (lambda: Declared("m", [FOLLOWS["copy"], FOLLOWS["copy"]]), "follows a topic twice"),
        (lambda: Declared("m", [FOLLOWS["copy"], Follow("other", Copy(COPY))]), "kept in one table"),
        (lambda: Columns(OWN, {"nowhere": "name"}), "has no column nowhere"),
        (lambda: Columns(OWN, {"name": "name", "entry_id": "id"}), "filled by itself"),
        (lambda: Columns(OWN, {"price": "price"}, key="name"), "primary key"),
        (lambda: Columns(OWN, {"name": cast("Any", 5)}), "does not say what the column name"),
        (lambda: Columns(OWN, {"name": cast("Any", ("a", len, 1))}), "does not say what the column name"),
        (lambda: Columns(OWN, {"price": "price"}), "name of conform_own may not be null"),
        (lambda: Follow("a b/c", Copy(COPY)), "cannot be the name of a topic"),
        (lambda: Declared("m", [FOLLOWS["copy"], replace(FOLLOWS["own"], type="conform.copy")]), "have one type"),
        (lambda: SqliteStore(":memory:"), "is no file"),
        (lambda: SqliteStore("/nowhere/at/all.db").create(DECLARED), "cannot be a file"),
        (lambda: PostgresStore("postgresql://me@here:port/db"), "no URL of a PostgreSQL database"),
        (lambda: Copy(OWN), "has no column state"),
        (lambda: Function(lambda _t, _c: None, writes=[Table("bare", MetaData(), Column("x", Text))]), "primary key"),
        (lambda: counting(Column("id", Integer, primary_key=True)), "made by the server"),
        (lambda: counting(Column("id", Integer, Sequence("s"), primary_key=True)), "made by the server"),
        (
            lambda: counting(Column("id", Integer, Identity(), primary_key=True), Column("n", Text, primary_key=True)),
            "made by the server",
        ),
        (
            lambda: Columns(Table("t", MetaData(), Column("id", Integer, Identity(), primary_key=True)), {}, key="id"),
            "made by the server",
        ),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_declared(declare: Callable[[], object], why: str) -> None:
    """With words that say what to do."""
    with pytest.raises(ConfigError, match=why) as caught:
        declare()
    assert caught.value.cure


@pytest.mark.parametrize("temporary", [True, False])
def test_many_rows_are_replaced_at_once(open_store: Callable[[Declared], SqlStore], temporary: bool) -> None:
    """What a mapping does not fill stays; one that is refused is found among them; names may be odd."""
    odd = Table(
        'odd "table" 100%', MetaData(), Column("the key", Text, primary_key=True), Column("n%", Integer),
        Column("note", Text, server_default="as it was"), CheckConstraint('"n%" <> 13'),
    )  # fmt: skip
    follow = Follow("t", Columns(odd, {"n%": "n"}, key="the key"))
    store = open_store(Declared("m", [follow]))
    if isinstance(store, PostgresStore):
        store._stages = temporary
    many = range(1200)
    put(store, follow, [made(f"k{n}", {"n": n + 100}, 1) for n in many])
    with store.engine.begin() as connection:
        connection.execute(update(odd).values(note="mine"))
    put(store, follow, [made(f"k{n}", {"n": n + 5000}, 2) for n in many])
    with pytest.raises(RefusedError):
        put(store, follow, [made(f"k{n}", {"n": n}, 3) for n in many])
    with store.engine.connect().execution_options(reads=True) as connection:
        found = connection.execute(select(odd.c["n%"], odd.c.note)).all()
    assert (sorted(n for n, _ in found), {note for _, note in found}) == ([n + 5000 for n in many], {"mine"})


def test_a_value_that_cannot_be_is_said_with_its_column() -> None:
    """And with the member that it came from; the key's own, too."""
    make = maker(Columns(OWN, {"name": "title", "price": lambda change: len(change.state["n"])}))
    for state, why in (
        ({"title": 5, "n": ""}, r"column name \(of 'title'\): TypeError: 5 is no text"),
        ({"title": "t", "n": 5}, "column price: TypeError: object of type 'int' has no len"),
        ([1], "the state is no object"),
    ):
        one = change("7", state, 5)
        assert isinstance(one, Change)
        with pytest.raises(ValueError, match=why):
            make(one, 5)


def test_a_file_that_is_no_database_is_said_with_its_cure(tmp_path: Path) -> None:
    """It is not the service's schema that is wrong."""
    (tmp_path / "model.db").write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        SqliteStore(tmp_path / "model.db").open(DECLARED)
    assert "Correct the path" in caught.value.cure


def test_a_store_without_its_tables_says_which(tmp_path: Path) -> None:
    """And one whose table has no such column."""
    store = SqliteStore(tmp_path / "model.db")
    with pytest.raises(SchemaError, match=r"There is no file .*model\.db"):
        store.open(DECLARED)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.db").touch()
    with pytest.raises(SchemaError, match=r"outbox_read_model_models .* is missing"):
        store.open(DECLARED)
    store.create(DECLARED)
    store.open(DECLARED)
    store.close()
    metadata = MetaData()
    wider = copy_table(metadata, "conform_copy")
    wider.append_column(Column("more", Text))
    store = SqliteStore(tmp_path / "model.db")
    with pytest.raises(SchemaError, match="has no column more"):
        store.open(Declared("m", [Follow("t", Copy(wider))]))
    store.close()


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("outbox_read_model_parked", "op.outbox_read_model_create()"),
        ("conform_copy", "op.outbox_read_model_copy('conform_copy')"),
        ("conform_own", "op.create_table('conform_own', ...)"),
    ],
)
def test_what_is_missing_is_said_with_the_line_that_makes_it(tmp_path: Path, missing: str, line: str) -> None:
    """To be pasted into a revision."""
    store = SqliteStore(tmp_path / "model.db")
    store.create(DECLARED)
    run(store, f"DROP TABLE {missing}")
    with pytest.raises(SchemaError) as caught:
        store.open(DECLARED)
    assert line in caught.value.cure
    store.close()


def test_autogenerate_leaves_copies_of_a_rebuild_alone_and_no_other_table(tmp_path: Path) -> None:
    """One of the service's own whose name ends like theirs is dropped when its MetaData has it no more."""
    store = SqliteStore(tmp_path / "model.db")
    store.create(DECLARED)
    store.open(DECLARED)
    store.begin_build()
    run(store, "CREATE TABLE brand__new (id integer PRIMARY KEY)")
    with store.engine.connect() as connection:
        script = produce_migrations(MigrationContext.configure(connection), METADATA)
    assert script.upgrade_ops is not None
    dropped = {one.table_name for one in script.upgrade_ops.ops if isinstance(one, DropTableOp)}
    assert dropped == {"brand__new"}
    store.close()


# -- copies of tables for a rebuild --------------------------------------------------------------------------------


def test_a_copy_has_names_of_its_own_that_are_no_longer_than_a_server_takes() -> None:
    """Of the table, and of its indexes, in one schema with them."""
    metadata = MetaData()
    tables = [
        Table(
            f"{'t' * 57}{letter}{'x' * 5}", metadata, Column("id", Text, primary_key=True),
            Column("a", Text, index=True), Column("b", Text, unique=True), Index(f"{'i' * 60}{letter}", "b"),
        )
        for letter in "ab"
    ]  # fmt: skip
    copies = shadows_of(tables)
    every = [*tables, *copies.values()]
    names = [table.name for table in every] + [str(index.name) for table in every for index in table.indexes]
    assert len({name[:63] for name in names}) == len(names)
    assert all(len(table.name.encode()) <= 63 for table in copies.values())
    assert shadow_name("adverts") == "adverts__new"


def test_copies_refer_to_copies() -> None:
    """And to no table that is served: a reference to one outside is looked at by the swap."""
    metadata = MetaData()
    Table("outside", metadata, Column("id", Text, primary_key=True))
    parent = Table("parent", metadata, Column("id", Text, primary_key=True))
    child = Table(
        "child", metadata, Column("id", Text, primary_key=True),
        Column("of", Text, ForeignKey("parent.id", ondelete="CASCADE")), Column("out", Text, ForeignKey("outside.id")),
    )  # fmt: skip
    (reference,) = shadows_of([child, parent])["child"].foreign_key_constraints
    assert (reference.referred_table.name, reference.ondelete) == ("parent__new", "CASCADE")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Declared], SqlStore]]:
    """Make a store of either database, with the tables of a model."""
    made: list[SqlStore] = []

    def make(declared: Declared) -> SqlStore:
        if request.param == "sqlite":
            store: SqlStore = SqliteStore(tmp_path / "model.db")
        else:
            store = PostgresStore(request.getfixturevalue("database_url"))
        store.create(declared)
        store.open(declared)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


def test_tables_that_refer_to_each_other_are_swapped(open_store: Callable[[Declared], SqlStore]) -> None:
    """Who is referred to comes first and goes last; a function may name what is unique, in the copy as well."""
    metadata = MetaData()
    parent = Table("parent", metadata, Column("id", Text, primary_key=True), Column("slug", Text, unique=True))
    child = Table("child", metadata, Column("id", Text, primary_key=True), Column("of", Text, ForeignKey("parent.id")))

    def write(tables: Tables, changes: Several[Change]) -> None:
        for one in changes:
            slug = text(
                f"INSERT INTO {tables[parent].name} (id, slug) VALUES (:id, :slug) ON CONFLICT (slug) DO NOTHING"
            )
            tables.connection.execute(slug, {"id": one.state["of"], "slug": one.state["of"].upper()})
            tables.connection.execute(tables[child].insert().values(id=one.key, of=one.state["of"]))

    follow = Follow("t", Function(write, writes=[child, parent]))
    store = open_store(Declared("family", [follow]))
    put(store, follow, [made("c1", {"of": "p1"}, 1), made("c2", {"of": "p2"}, 1)])
    store.begin_build()
    put(store, follow, [made("c2", {"of": "p3"}, 2), made("c3", {"of": "p3"}, 2)], build="new")
    assert store.swap("print") == []
    with store.engine.connect() as connection:
        assert sorted(map(tuple, connection.execute(select(child.c.id, child.c.of)))) == [("c2", "p3"), ("c3", "p3")]
        assert connection.execute(select(parent.c.id)).scalars().all() == ["p3"]


def name_sellers(tables: Tables, changes: Several[Change]) -> None:
    """A seller's name, also in the offers that are there."""
    for one in changes:
        tables.connection.execute(tables[SELLERS].insert().values(id=one.key, name=one.state["name"]))
        theirs = tables[OFFERS].update().where(tables[OFFERS].c.seller == one.key)
        tables.connection.execute(theirs.values(name=one.state["name"]))


def make_offers(tables: Tables, changes: Several[Change]) -> None:
    """An offer, with the name of its seller, if that is known."""
    for one in changes:
        seller = one.state["seller"]
        name = tables.connection.execute(select(tables[SELLERS].c.name).where(tables[SELLERS].c.id == seller)).scalar()
        tables.connection.execute(tables[OFFERS].insert().values(id=one.key, seller=seller, name=name))


BOTH = MetaData()
SELLERS = Table("sellers", BOTH, Column("id", Text, primary_key=True), Column("name", Text))
OFFERS = Table("offers", BOTH, Column("id", Text, primary_key=True), Column("seller", Text), Column("name", Text))


@pytest.mark.postgres
def test_two_topics_of_a_model_with_a_function_never_miss_each_other(database_url: str) -> None:
    """Each of two functions reads what the other writes: who comes second waits for the first to end.

    A rebuild, which writes copies of the tables, is not held up. (Of SQLite one transaction writes at a time.)
    """
    users = Follow("market.user", Function(name_sellers, writes=[SELLERS, OFFERS]))
    adverts = Follow("market.advert", Function(make_offers, writes=[OFFERS, SELLERS]))
    first, second, rebuilding = stores = [PostgresStore(database_url) for _ in range(3)]
    for store in stores:
        store.create(Declared("market", [users, adverts]))
        store.open(Declared("market", [users, adverts]))
    rebuilding.begin_build()
    putting = threading.Thread(target=put, args=(second, adverts, [made("piano", {"seller": "ada"})]))
    with first.transaction() as transaction:
        transaction.put(users, [made("ada", {"name": "Ada"})], {"ada": 1}, transaction.held(users, ["ada"]))
        putting.start()
        eventually(lambda: waits_to_be_alone(rebuilding), seconds=20, what="the second to wait")
        put(rebuilding, users, [made("ada", {"name": "Ada"})], build="new")
    putting.join()
    with first.engine.connect() as connection:
        assert connection.execute(select(OFFERS.c.name)).scalars().all() == ["Ada"]
    for store in stores:
        store.close()


def waits_to_be_alone(store: SqlStore) -> bool:
    """Whether somebody waits for a lock that is a number's, in the store's database."""
    own = "(SELECT oid FROM pg_database WHERE datname = current_database())"
    waiting = f"SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = {own}"
    with store.engine.connect() as connection:
        return bool(connection.exec_driver_sql(waiting).scalar())


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -1, 0.0004, 3e6, math.inf, math.nan])
@pytest.mark.parametrize("make", [partial(PostgresStore, "postgresql://nowhere/none"), partial(SqliteStore, "none.db")])
def test_seconds_that_a_store_cannot_keep_are_refused(make: Callable[..., SqlStore], seconds: float) -> None:
    """0 would not mean "at once": PostgreSQL switches its limits off."""
    with pytest.raises(ConfigError, match=r"seconds of a .*Store cannot be") as caught:
        make(seconds=seconds)
    assert "0.001 to 2,147,483" in caught.value.cure
    make(seconds=0.001)
    make(seconds=2_147_483)


@pytest.mark.postgres
def test_seconds_of_postgresql_limit_a_wait_and_a_transaction_that_does_not_go_on(database_url: str) -> None:
    """Who waits for a lock gives up after his own; who holds it and is silent is ended after his."""
    patient, brief = PostgresStore(database_url), PostgresStore(database_url, seconds=0.2)
    patient.create(DECLARED)
    patient.open(DECLARED)
    brief.open(DECLARED)
    place = Place("t", 0)
    with patient.transaction() as holding:
        assert holding.claim(place).epoch == 1
        with pytest.raises(StoreUnavailableError, match="lock timeout"), brief.transaction() as waiting:
            waiting.claim(place)

    def is_silent() -> None:
        with brief.transaction() as silent:
            silent.claim(place)
            with patient.transaction() as waiting:
                # The other is ended meanwhile, by the server, and has claimed nothing.
                assert waiting.claim(place).epoch == 2
            silent.offsets()

    with pytest.raises(StoreUnavailableError):
        is_silent()
    patient.close()
    brief.close()


@pytest.mark.postgres
def test_the_longest_seconds_are_taken_by_postgresql(database_url: str) -> None:
    """As milliseconds they are whole numbers of four bytes."""
    store = PostgresStore(database_url, seconds=2_147_483)
    store.create(DECLARED)
    store.close()


def test_seconds_of_sqlite_are_how_long_a_transaction_waits(tmp_path: Path) -> None:
    """For one that goes on."""
    file = tmp_path / "model.db"
    holder = SqliteStore(file)
    holder.create(DECLARED)
    holder.open(DECLARED)

    def waits(seconds: float) -> float:
        with closing(SqliteStore(file, seconds=seconds)) as store:
            store.open(DECLARED)
            began = time.monotonic()
            with pytest.raises(StoreUnavailableError, match="locked"), store.transaction():
                pass
            return time.monotonic() - began

    with holder.transaction():
        assert waits(0.5) > 0.4
        assert min(waits(0.01) for _ in range(5)) < 0.4
    holder.close()


def test_a_property_that_only_librdkafka_can_judge_is_refused_when_the_model_runs(tmp_path: Path) -> None:
    """It ends it: no waiting makes it known."""
    store = SqliteStore(tmp_path / "model.db")
    model = ReadModel("m", store, [FOLLOWS["copy"]], bootstrap="localhost:1", kafka={"no.such.property": "1"})
    store.create(model.declared)
    with pytest.raises(ConfigError, match=r"no\.such\.property"), model.running() as copies:
        copies.wait_ready(60)


@pytest.mark.parametrize(("settings", "held"), [({}, {"gone": 2}), ({"forget_deleted": 3600.0}, {})])
def test_the_id_of_a_deleted_entity_is_remembered_for_so_long(
    settings: dict[str, Any], held: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that was deleted two hours ago."""
    monkeypatch.setattr(consumer, "Subscription", Log("t").subscription)
    follow = Follow("t", Columns(OWN, {"name": "name"}))
    store = SqliteStore(tmp_path / "model.db")
    model = ReadModel("m", store, [follow], bootstrap="none", check_seconds=0.001, **settings)
    store.create(model.declared)
    store.open(model.declared)
    with store.transaction() as transaction:
        transaction.delete(follow, [made("gone", None, 2)], {"gone": 2})
    run(store, "UPDATE outbox_read_model_keys SET at = at - 7200")
    with model.running() as copies:
        copies.wait_ready(60)
    store.open(model.declared)
    with store.transaction(reads=True) as transaction:
        assert transaction.held(follow, ["gone"]) == held
    store.close()


# -- errors of the database ----------------------------------------------------------------------------------------


def test_a_schema_that_does_not_fit_is_no_fault_of_the_messages(open_store: Callable[[Declared], SqlStore]) -> None:
    """Nothing is parked for it: it is said, with what mends it."""
    store = open_store(DECLARED)
    follow = FOLLOWS["own"]
    run(store, "ALTER TABLE conform_own DROP COLUMN price")
    for many in (1, 100):
        with pytest.raises(StoreError, match="price") as caught:
            put(store, follow, [made(f"k{n}", {"name": "x"}, 1) for n in range(many)])
        assert "Migrate" in caught.value.cure


def test_a_file_that_cannot_be_written_is_waited_for(tmp_path: Path) -> None:
    """As when it is full."""
    store = SqliteStore(tmp_path / "model.db")
    store.create(DECLARED)
    store.open(DECLARED)
    with store.engine.connect().execution_options(reads=True) as connection:
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailableError, match="readonly"):
        put(store, FOLLOWS["own"], [made("a", {"name": "x"}, 1)])
    store.close()


@pytest.mark.postgres
def test_a_server_that_became_a_standby_is_waited_for_over_another_connection(database_url: str) -> None:
    """The one that there is would stay with it."""
    store = PostgresStore(database_url)
    store.create(DECLARED)
    store.open(DECLARED)
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("SET SESSION default_transaction_read_only = on")
    with pytest.raises(StoreUnavailableError, match="read-only"):
        store.know(fingerprint="x")
    store.know(fingerprint="x")
    store.close()


@pytest.mark.postgres
@pytest.mark.parametrize(("user", "database", "cure"), [("nobody_at_all", None, "user"), (None, "nowhere", "database")])
def test_a_connection_that_is_refused_is_said_not_waited_for(
    database_url: str, user: str | None, database: str | None, cure: str
) -> None:
    """Trying again does not mend it."""
    url = make_url(database_url)
    url = url.set(username=user or url.username, database=database or url.database)
    store = PostgresStore(url.render_as_string(hide_password=False))
    with pytest.raises(StoreError, match="does not exist") as caught:
        store.open(DECLARED)
    assert f"Correct the {cure}" in caught.value.cure
    store.close()


@pytest.mark.postgres
def test_a_privilege_that_is_missing_is_said_with_its_cure(database_url: str) -> None:
    """It is no fault of the messages either."""
    store = PostgresStore(database_url)
    store.create(DECLARED)
    store.open(DECLARED)
    run(store, "CREATE ROLE reader_of_a_model; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_of_a_model")
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("SET ROLE reader_of_a_model")
    with pytest.raises(StoreError, match="permission denied") as caught:
        put(store, FOLLOWS["own"], [made("a", {"name": "x"}, 1)])
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("RESET ROLE")
    assert "Grant" in caught.value.cure
    run(store, "DROP OWNED BY reader_of_a_model; DROP ROLE reader_of_a_model")
    store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("many", [1, 100])
def test_a_text_that_postgresql_does_not_take_is_the_messages(database_url: str, many: int) -> None:
    """However it is written; and a key that is no number of the column's size has no row."""
    store = PostgresStore(database_url)
    store.create(DECLARED)
    store.open(DECLARED)
    changes = [made(f"{n}", {"name": "x\0y"}, 1) for n in range(many)]
    with pytest.raises(RefusedError):
        put(store, FOLLOWS["own"], changes)
    with store.transaction(reads=True) as transaction:
        assert transaction.held(FOLLOWS["apart"], ["1", str(10**30)]) == {}
    store.close()


@pytest.mark.postgres
def test_a_swap_may_take_longer_than_a_statement(database_url: str) -> None:
    """It replaces all rows."""
    store = PostgresStore(database_url)
    store.create(DECLARED)
    with store.engine.begin() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "10min"
        store.unhurried(connection)
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
    store.close()


def test_a_rebuild_that_another_process_has_done_meanwhile_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for, and it is not any more once this one has the right to rebuild; nothing is begun."""
    store = SqliteStore(tmp_path / "model.db")
    store.create(DECLARED)
    store.open(DECLARED)
    store.ask_rebuild("why not")
    builder = store.builder

    @contextmanager
    def after_another() -> Iterator[bool]:
        store.ask_rebuild(None)
        with builder() as mine:
            yield mine

    monkeypatch.setattr(store, "builder", after_another)
    monkeypatch.setattr(store, "begin_build", lambda: pytest.fail("it is begun"))
    with closing(Wake()) as wake:
        assert not Rebuild(DECLARED, store, Settings("nowhere:1")).run(wake, why="why not")
    store.close()


def test_a_model_whose_name_no_file_can_have_is_rebuilt(tmp_path: Path) -> None:
    """The lock's file is named otherwise."""
    store = SqliteStore(tmp_path / "model.db")
    declared = Declared(f"a/b/{'ä' * 90}", [FOLLOWS["copy"]])
    store.create(declared)
    store.open(declared)
    with store.builder() as mine:
        assert mine
    store.close()


def test_currency_is_ready_once_it_is_as_far_as_the_topics_were_at_its_start() -> None:
    """Not as they are; an empty partition has nothing; who is behind is not current, and its age grows."""
    currency = Currency(("t",))
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    at = [begin + dt.timedelta(seconds=n) for n in range(10)]
    full, empty = Place("t", 0), Place("t", 1)

    def bounds(end: int) -> dict[Place, Bounds]:
        return {full: Bounds(0, end), empty: Bounds(4, 4)}

    assert not currency.saw(bounds(10), {}, at[0])
    assert currency.staleness(at[0]) is None
    assert (currency.behind, currency.left({full: 3})) == ({"t": 10}, 7)
    assert currency.saw(bounds(20), {full: 10}, at[1])
    assert (currency.ready, currency.loaded_at, currency.behind) == (True, at[1], {"t": 10})
    assert currency.staleness(at[2]) == 2
    assert not currency.saw(bounds(20), {full: 20}, at[3])
    assert currency.staleness(at[5]) == 2
    assert not currency.saw(bounds(25), {full: 20}, at[6])
    assert currency.staleness(at[7]) == 4


def test_a_copy_of_a_busy_topic_that_is_never_at_its_end_is_not_said_to_be_old() -> None:
    """The mark of the last transaction is always left; it is as new as the last look whose ends it has passed."""
    currency = Currency(("t", "silent"))
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    busy, silent = Place("t", 0), Place("silent", 0)
    for second in range(60):
        at = begin + dt.timedelta(seconds=second)
        end = 100 * (second + 1)
        currency.saw({busy: Bounds(0, end), silent: Bounds(0, 7)}, {busy: end - 1, silent: 7}, at)
        assert currency.behind["t"] == 1
        if second:
            assert currency.staleness(at) == 1
    # It hangs: the age grows.
    for second in range(60, 70):
        at = begin + dt.timedelta(seconds=second)
        currency.saw({busy: Bounds(0, 9000), silent: Bounds(0, 7)}, {busy: 5999, silent: 7}, at)
    assert currency.staleness(at) == 11
