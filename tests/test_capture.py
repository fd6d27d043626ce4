"""Capture: a trigger publishes a table, whatever changes it."""

from __future__ import annotations

import datetime as dt
import enum
import inspect
import io
import re
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

import outbox.operations
from devstack.postgres import bin_directory
from outbox import schema as outbox_schema
from outbox.capture import SEARCH_PATH, TEXT_SETTINGS, Capture
from outbox.errors import CaptureError, DatabaseError, UnknownTypeError
from outbox.key import key_text

assert outbox.operations
pytestmark = pytest.mark.postgres


@pytest.fixture
def database(outbox_database: str) -> str:
    """An outbox with the entity type `item`, and a table of items with a composite key."""
    with psycopg.connect(outbox_database) as connection:
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('item', 'item')")
        connection.execute("CREATE TABLE item (id int PRIMARY KEY, name text, price numeric, note text)")
        connection.execute("INSERT INTO item VALUES (1, 'one', 1.10, NULL), (2, 'two', 2, NULL)")
    return outbox_database


def operate(url: str, name: str, *arguments: Any, isolation: str = "READ COMMITTED", **options: Any) -> None:
    """Call an operation as a revision does."""
    engine = create_engine(
        url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool, isolation_level=isolation
    )
    with engine.begin() as connection:
        getattr(Operations(MigrationContext.configure(connection)), name)(*arguments, **options)


@pytest.fixture
def items(database: str) -> Iterator[psycopg.Connection]:
    """A connection to a database whose items are captured, without the rows that were there."""
    operate(database, "outbox_capture", "item", type="item", existing_rows=False)
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def entries(connection: psycopg.Connection) -> list[tuple[str, Any]]:
    """Key and state (None: a tombstone) of every entry, in id order."""
    rows = connection.execute("SELECT key, convert_from(state, 'UTF8') FROM outbox.entries ORDER BY id").fetchall()
    return [(key, None if state is None else orjson.loads(state)) for key, state in rows]


def test_insert_update_and_delete_write_the_rows_state(items: psycopg.Connection) -> None:
    """Each change writes what the row is now; its end a tombstone."""
    items.execute("INSERT INTO item VALUES (3, 'three', 3, NULL)")
    items.execute("UPDATE item SET price = 3.5 WHERE id = 3")
    items.execute("DELETE FROM item WHERE id = 3")
    three = {"id": 3, "name": "three", "note": None}
    assert entries(items) == [("3", three | {"price": 3}), ("3", three | {"price": 3.5}), ("3", None)]


def test_existing_rows_are_written_in_the_same_transaction(database: str) -> None:
    """The trigger's lock keeps writers out until the migration commits."""
    operate(database, "outbox_capture", "item", type="item")
    with psycopg.connect(database) as connection:
        assert [key for key, _ in entries(connection)] == ["1", "2"]


def test_a_change_of_key_is_a_tombstone_for_the_old_and_a_state_for_the_new(items: psycopg.Connection) -> None:
    """Consumers know entities by key."""
    items.execute("UPDATE item SET id = 9 WHERE id = 1")
    assert [(key, state and state["id"]) for key, state in entries(items)] == [("1", None), ("9", 9)]


def test_keys_swapped_in_one_transaction_end_at_the_tables_state(items: psycopg.Connection) -> None:
    """The re-read finds whoever has the key now."""
    with items.transaction():
        items.execute("UPDATE item SET id = 100 WHERE id = 1")
        items.execute("UPDATE item SET id = 1 WHERE id = 2")
        items.execute("UPDATE item SET id = 2 WHERE id = 100")
    last = dict(entries(items))
    assert last["100"] is None
    assert (last["1"]["name"], last["2"]["name"]) == ("two", "one")


def test_under_a_nested_trigger_the_newest_row_comes_last(items: psycopg.Connection) -> None:
    """With NEW the outer trigger, which fires last, would write its older row."""
    items.execute(
        """CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO wrong (key, name) VALUES (NEW.id, NEW.name);
             IF NEW.note IS NULL THEN UPDATE item SET note = 'seen', name = upper(name) WHERE id = NEW.id; END IF;
             RETURN NULL; END $$"""
    )
    items.execute("CREATE TABLE wrong (n serial, key int, name text)")
    items.execute("CREATE TRIGGER a_nested AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION audit()")
    # The wrong way, as a capture by NEW would do it: it fires after the nested one.
    items.execute(
        """CREATE FUNCTION by_new() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO wrong (key, name) VALUES (-NEW.id, NEW.name); RETURN NULL; END $$"""
    )
    items.execute("CREATE TRIGGER z_by_new AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION by_new()")
    items.execute("UPDATE item SET name = 'uno' WHERE id = 1")
    assert entries(items)[-1][1]["name"] == "UNO"
    by_new = items.execute("SELECT name FROM wrong WHERE key = -1 ORDER BY n DESC LIMIT 1").fetchone()
    assert by_new == ("uno",)


def test_composite_keys_are_joined_by_colons_and_escaped(database: str) -> None:
    """Two different keys never have the same text."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE TABLE part (a text, b text, n int, PRIMARY KEY (a, b))")
        connection.execute(r"INSERT INTO part VALUES ('x:y', 'z', 1), ('x', 'y:z', 2), ('q\', 'r', 3)")
    operate(database, "outbox_capture", "part", type="item", key=("a", "b"))
    with psycopg.connect(database) as connection:
        assert {key for key, _ in entries(connection)} == {r"x\:y:z", r"x:y\:z", r"q\\:r"}


def test_chosen_columns_make_the_state_and_others_write_nothing(database: str) -> None:
    """A change that consumers cannot see is none."""
    operate(database, "outbox_capture", "item", type="item", columns=["id", "name"], existing_rows=False)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE item SET price = 99")
        assert entries(connection) == []
        connection.execute("UPDATE item SET name = 'new' WHERE id = 1")
        assert entries(connection) == [("1", {"id": 1, "name": "new"})]


def test_a_virtual_column_among_them_is_published_when_its_base_changes(database: str) -> None:
    """The row of a trigger does not hold it, so an unchanged one cannot be told: an entry is written."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE made (id int PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) VIRTUAL)"
        )
        connection.execute("INSERT INTO made VALUES (1, 1)")
        operate(database, "outbox_capture", "made", type="item", columns=["id", "twice"], existing_rows=False)
        connection.execute("UPDATE made SET a = 5")
        assert entries(connection) == [("1", {"id": 1, "twice": 10})]


def test_a_row_whose_state_is_null_is_not_published(database: str) -> None:
    """A tombstone: drafts, say, stay at home; the source leaves them out."""
    state = "CASE WHEN t.price < 10 THEN jsonb_build_object('name', t.name) END"
    operate(database, "outbox_capture", "item", type="item", state=state)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE item SET price = 20 WHERE id = 1")
        assert entries(connection) == [("1", {"name": "one"}), ("2", {"name": "two"}), ("1", None)]
        assert by_source(connection) == [("2", '{"name": "two"}')]


def test_an_expression_may_make_the_state(database: str) -> None:
    """Over the row `t`."""
    state = "jsonb_build_object('label', t.name || '!')"
    operate(database, "outbox_capture", "item", type="item", state=state)
    with psycopg.connect(database) as connection:
        assert entries(connection) == [("1", {"label": "one!"}), ("2", {"label": "two!"})]


def test_the_derived_source_equals_the_trigger_byte_for_byte(items: psycopg.Connection) -> None:
    """Reconcile compares the two."""
    items.execute("UPDATE item SET price = price")
    assert by_source(items) == by_trigger(items)


def by_source(connection: psycopg.Connection) -> list[tuple[str, str]]:
    """What the type's source gives in a session with the pinned settings, by key."""
    row = connection.execute("SELECT source FROM outbox.entity_types WHERE name = 'item'").fetchone()
    assert row is not None
    with connection.transaction():
        for name, value in {"search_path": SEARCH_PATH, **TEXT_SETTINGS}.items():
            connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        return sorted(row[:2] for row in connection.execute(row[0]).fetchall())


def by_trigger(connection: psycopg.Connection) -> list[tuple[str, str]]:
    """The last entry's state of each key, by key."""
    return connection.execute(
        "SELECT DISTINCT ON (key) key, convert_from(state, 'UTF8') FROM outbox.entries ORDER BY key, id DESC"
    ).fetchall()


ODD_SESSION = (
    "SET timezone = 'Asia/Kathmandu'; SET datestyle = 'German'; SET intervalstyle = 'iso_8601'; "
    "SET bytea_output = 'escape'; SET extra_float_digits = -10; SET search_path = public"
)


def test_source_and_trigger_give_equal_bytes_whatever_the_writers_session(database: str) -> None:
    """Reconcile would report every row as stale, for ever, where they differ by a time zone."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE odd (id int PRIMARY KEY, t text, at timestamptz, f float8, r real, b bytea, i interval, "
            "n numeric, j jsonb, a timestamptz[], v tstzrange, c regclass, m money, d date)"
        )
        row = (
            "'x', '2024-06-01 12:00+00', 0.1::float8 + 0.2::float8, 0.1, '\\xff00', '1 day 2 hours', 1.10, "
            "'{\"b\": 1.50, \"a\": null}', ARRAY['2024-01-01 00:00+00'::timestamptz], "
            "tstzrange('2024-01-01 00:00+00', NULL), 'odd', 1.5::numeric::money, '2024-02-03'"
        )
        connection.execute(f"INSERT INTO odd VALUES (1, {row})".encode())
    operate(database, "outbox_capture", "odd", type="item")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(ODD_SESSION)
        connection.execute("INSERT INTO odd SELECT 2, t, at, f, r, b, i, n, j, a, v, c, m, d FROM odd")
        first, second = by_trigger(connection)
        assert second[1] == first[1].replace('"id": 1', '"id": 2')
        assert [first, second] == by_source(connection)
        assert '"f": 0.30000000000000004' in second[1]
        # The wrong way: the same query in the writer's session.
        source = connection.execute("SELECT source FROM outbox.entity_types").fetchone()
        assert source is not None
        assert sorted(row[:2] for row in connection.execute(source[0]).fetchall()) != [first, second]


@pytest.mark.parametrize("option", [{"columns": ["id", "at"]}, {"state": "jsonb_build_object('at', t.at::text)"}])
def test_every_form_of_the_state_equals_its_source(database: str, option: dict[str, Any]) -> None:
    """Columns, and an expression that makes a text of a timestamp."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE TABLE odd (id int PRIMARY KEY, at timestamptz)")
        connection.execute("INSERT INTO odd VALUES (1, '2024-06-01 12:00+00')")
    operate(database, "outbox_capture", "odd", type="item", **option)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(ODD_SESSION)
        connection.execute("INSERT INTO odd VALUES (2, '2024-06-01 12:00+00')")
        assert by_source(connection) == by_trigger(connection)


def test_the_migrations_session_keeps_its_settings(database: str) -> None:
    """They are pinned for two statements, not for the service's own revision."""
    engine = create_engine(database.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(ODD_SESSION)
        shown = "SELECT name, setting FROM pg_settings WHERE lower(name) = ANY (%s) ORDER BY 1"
        names = [name.lower() for name in ("search_path", *TEXT_SETTINGS)]
        before = connection.exec_driver_sql(shown, (names,)).all()
        op: Any = Operations(MigrationContext.configure(connection))
        op.outbox_capture("item", type="item")
        assert connection.exec_driver_sql(shown, (names,)).all() == before


class Mood(enum.Enum):
    """As the database's enum."""

    SAD = "so: so"


KINDS: Sequence[tuple[str, object]] = [
    ("smallint", -3),
    ("integer", 0),
    ("bigint", 9_000_000_000),
    ("text", "a:b\\c d'é"),
    ("varchar(20)", "x"),
    ("char(6)", "abc"),
    ("uuid", uuid.UUID("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11")),
    ("boolean", True),
    ("boolean", False),
    ("date", dt.date(987, 2, 3)),
    ("mood", Mood.SAD),
    ("whole", 7),
    ("yes", True),
]


def captured_key(url: str, *parts: tuple[str, object]) -> str:
    """The key that the trigger writes for a row with these kinds of columns, in an odd session."""
    names = [f"k{n}" for n in range(len(parts))]
    values = [value.value if isinstance(value, Mood) else value for _, value in parts]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TYPE mood AS ENUM ('so: so', 'ok'); CREATE DOMAIN inner_whole AS bigint")
        connection.execute("CREATE DOMAIN whole AS inner_whole CHECK (VALUE > 0); CREATE DOMAIN yes AS boolean")
        columns = ", ".join(f"{name} {kind}" for name, (kind, _) in zip(names, parts, strict=True))
        connection.execute(f"CREATE TABLE keyed ({columns}, v int, PRIMARY KEY ({', '.join(names)}))".encode())
    operate(url, "outbox_capture", "keyed", type="item", key=names)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(ODD_SESSION)
        connection.execute(f"INSERT INTO keyed VALUES ({'%s, ' * len(parts)} 1)".encode(), values)
        connection.execute("UPDATE keyed SET v = 2")
        ((key, number),) = connection.execute("SELECT key, count(*) FROM outbox.entries GROUP BY key").fetchall()
        assert number == 2
        assert [key] == [source_key for source_key, _ in by_source(connection)]
        return str(key)


@pytest.mark.parametrize(("kind", "value"), KINDS, ids=[f"{kind}-{value}" for kind, value in KINDS])
def test_a_key_has_the_text_that_the_writer_gives_it(database: str, kind: str, value: object) -> None:
    """A service may write some entities itself and have others captured; consumers see one kind of key."""
    assert captured_key(database, (kind, value)) == key_text("item", value)


def test_a_composite_key_of_all_kinds_has_the_text_that_the_writer_gives_it(database: str) -> None:
    """With colons and backslashes in its parts."""
    assert captured_key(database, *KINDS) == key_text("item", tuple(value for _, value in KINDS))


@pytest.mark.parametrize(
    "kind",
    [
        "timestamptz",
        "timestamp",
        "numeric",
        "float8",
        "bytea",
        "interval",
        "jsonb",
        "int[]",
        "name",
        "exact",
        "text COLLATE nocase",
    ],
)
def test_a_key_with_more_than_one_text_is_refused(database: str, kind: str) -> None:
    """1.0 and 1.00 are equal to the table and two entities to a consumer; a time has a text for each time zone."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE DOMAIN exact AS numeric")
        connection.execute('CREATE COLLATION nocase FROM "C"')
        connection.execute(f"CREATE TABLE bad (id {kind} PRIMARY KEY)".encode())
        # The server of the tests has no ICU, which alone can make such a collation.
        connection.execute("UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'nocase'")
    with pytest.raises(CaptureError, match="may have different texts") as caught:
        operate(database, "outbox_capture", "bad", type="item")
    assert "another unique column" in caught.value.cure


def test_columns_named_like_the_functions_own_words_are_read(database: str) -> None:
    """In a state expression, and as the table's only columns."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, t text, entity text, states text, tg_op text)")
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('other', 'other')")
        connection.execute("CREATE TABLE u (LIKE t INCLUDING ALL)")
        operate(database, "outbox_capture", "t", type="item", state="to_jsonb(entity || states || tg_op) -- $outbox$")
        operate(database, "outbox_capture", "u", type="other")
        connection.execute("INSERT INTO t VALUES (1, 'a', 'b', 'c', 'd')")
        connection.execute("INSERT INTO u SELECT * FROM t")
        assert entries(connection)[0][1] == "bcd"
        assert entries(connection)[1][1] == {"id": 1, "t": "a", "entity": "b", "states": "c", "tg_op": "d"}


def test_a_state_of_many_columns_is_made_in_parts(database: str) -> None:
    """A function of PostgreSQL takes 100 arguments."""
    names = [f"c{n}" for n in range(120)]
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE wide (id int PRIMARY KEY, {', '.join(f'{n} int' for n in names)})".encode())
        operate(database, "outbox_capture", "wide", type="item", columns=names)
        connection.execute("INSERT INTO wide VALUES (1)")
        assert entries(connection) == [("1", dict.fromkeys(names))]


def test_also_a_replication_role_is_captured(items: psycopg.Connection) -> None:
    """ENABLE ALWAYS: rows that a logical apply worker writes change the table too."""
    items.execute("SET session_replication_role = replica")
    items.execute("UPDATE item SET name = 'x' WHERE id = 1")
    assert len(entries(items)) == 1


def test_truncate_is_refused_with_the_cure(items: psycopg.Connection) -> None:
    """It fires no row trigger: the topic would keep what the table lost."""
    with pytest.raises(psycopg.Error) as caught:
        items.execute("TRUNCATE item")
    assert caught.value.sqlstate == "OB021"
    assert "tombstones" in (caught.value.diag.message_hint or "")


def test_truncate_writes_tombstones_in_read_committed_only(database: str) -> None:
    """An older snapshot lacks rows that were committed before the table was locked: they would stay in the topic."""
    operate(database, "outbox_capture", "item", type="item", existing_rows=False, truncate="tombstones")
    with psycopg.connect(database) as old, psycopg.connect(database, autocommit=True) as other:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        other.execute("INSERT INTO item VALUES (5, 'five', 5, NULL)")
        with pytest.raises(psycopg.Error, match="in REPEATABLE READ TRUNCATE may miss rows") as caught:
            old.execute("TRUNCATE item")
        assert caught.value.sqlstate == "OB021"


def test_a_key_that_was_deleted_since_the_snapshot_is_a_serialization_failure(items: psycopg.Connection) -> None:
    """The re-read finds the row of the snapshot and the new one: whatever retries transactions, retries this."""
    with psycopg.connect(items.info.dsn) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        items.execute("DELETE FROM item WHERE id = 1")
        with pytest.raises(psycopg.errors.SerializationFailure, match='item "1" was deleted by a concurrent'):
            old.execute("INSERT INTO item VALUES (1, 'again', 1, NULL)")
        old.rollback()
        old.execute("INSERT INTO item VALUES (1, 'again', 1, NULL)")
        old.commit()
    assert [(key, state and state["name"]) for key, state in entries(items)] == [("1", None), ("1", "again")]


def test_truncate_may_write_tombstones(database: str) -> None:
    """One for each row."""
    operate(database, "outbox_capture", "item", type="item", existing_rows=False, truncate="tombstones")
    with psycopg.connect(database) as connection:
        connection.execute("TRUNCATE item")
        assert sorted(entries(connection)) == [("1", None), ("2", None)]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("CREATE TABLE bad (id int, UNIQUE (id) DEFERRABLE, CHECK (id IS NOT NULL))", "may be null"),
        ("CREATE TABLE bad (id int NOT NULL, UNIQUE (id) DEFERRABLE INITIALLY IMMEDIATE)", "immediate unique"),
        ("CREATE TABLE bad (id int NOT NULL)", "immediate unique"),
        ("CREATE TABLE bad (id int NOT NULL, x int NOT NULL, UNIQUE (id, x))", "immediate unique"),
        ("CREATE TABLE bad (id int PRIMARY KEY) PARTITION BY LIST (id)", "partitioned"),
        ("CREATE VIEW bad AS SELECT 1 AS id", "no table"),
    ],
)
def test_a_table_whose_keys_do_not_order_its_changes_is_refused(database: str, table: str, why: str) -> None:
    """With a deferrable key a delete and an insert of the same key do not wait for each other."""
    with psycopg.connect(database) as connection:
        connection.execute(table.encode())
    with pytest.raises(CaptureError, match=why) as caught:
        operate(database, "outbox_capture", "bad", type="item")
    assert caught.value.cure


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"columns": ["id", "nope"]}, "column t.nope does not exist"),
        ({"columns": []}, "names no columns"),
        ({"state": "1"}, "cannot cast type integer to jsonb"),
        ({"state": "t.name"}, "of type text, not json"),
        ({"state": "to_jsonb(t.name"}, "syntax error"),
        ({"state": "jsonb_array_elements('[1, 2]')"}, "set-returning"),
        ({"state": "jsonb_agg(t.name)"}, "aggregate"),
        ({"state": "to_jsonb(shout(t.name))"}, "shout.* does not exist"),
        ({"key": "nope"}, "key column nope is missing"),
        ({"key": ()}, "names no key"),
        ({"table_schema": "sales"}, "there is no such table"),
    ],
)
def test_what_would_break_every_write_is_refused_at_once(database: str, option: dict[str, Any], why: str) -> None:
    """The migration fails, not the service after it. `shout` is in public, which the trigger does not see."""
    with psycopg.connect(database) as connection:
        connection.execute("CREATE FUNCTION shout(text) RETURNS text LANGUAGE sql RETURN upper($1)")
    with pytest.raises(CaptureError, match=why) as caught:
        operate(database, "outbox_capture", "item", type="item", existing_rows=False, **option)
    assert caught.value.cure


def test_a_key_of_one_column_may_be_a_plain_text(database: str) -> None:
    """Not its letters."""
    operate(database, "outbox_capture", "item", type="item", key="id", columns="name")
    with psycopg.connect(database) as connection:
        assert entries(connection) == [("1", {"name": "one"}), ("2", {"name": "two"})]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("('', 'x')", r'the key "" of an entity of type "item" has 0 bytes'),
        ("(repeat('k', 1025), 'x')", r'the key "kkk.*" of an entity of type "item" has 1025 bytes'),
        ("('big', repeat('x', 2000))", r'the state of item "big" has 20.. bytes'),
    ],
)
def test_an_existing_row_that_cannot_be_published_is_named(database: str, row: str, why: str) -> None:
    """With the cure, and nothing is captured."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE outbox.entity_types SET max_bytes = 1000")
        connection.execute("CREATE TABLE old (id text PRIMARY KEY, v text)")
        connection.execute(f"INSERT INTO old VALUES ('fine', ''), {row}".encode())
        with pytest.raises(CaptureError, match=why) as caught:
            operate(database, "outbox_capture", "old", type="item", columns=["v"])
        assert caught.value.cure
        assert connection.execute("SELECT count(*) FROM outbox.captures").fetchone() == (0,)


def test_existing_rows_are_written_in_read_committed_only(database: str) -> None:
    """They must be read after the lock was taken: an older snapshot lacks what was committed before."""
    with pytest.raises(CaptureError, match="must be written in READ COMMITTED, not in repeatable read"):
        operate(database, "outbox_capture", "item", type="item", isolation="REPEATABLE READ")
    operate(database, "outbox_capture", "item", type="item", isolation="REPEATABLE READ", existing_rows=False)


def test_a_capture_is_made_in_one_transaction(database: str) -> None:
    """In autocommit a failure would leave half of it; rows written after the lock is gone may be stale."""
    with pytest.raises(CaptureError, match="inside a transaction"):
        operate(database, "outbox_capture", "item", type="item", isolation="AUTOCOMMIT")
    from outbox.capture import statements

    *made, existing_rows = statements(Capture("item", "item"), existing_rows=True)
    with psycopg.connect(database) as connection:
        for statement in made:
            connection.execute(statement.encode())
        connection.commit()
        with pytest.raises(psycopg.Error, match="in the transaction that captures it"):
            connection.execute(existing_rows.encode())


def test_a_type_publishes_one_table_and_a_table_is_captured_once(database: str) -> None:
    """Rows of one key in two tables would overwrite each other."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE other (id int PRIMARY KEY)")
        operate(database, "outbox_capture", "item", type="item")
        with pytest.raises(CaptureError, match=r'"item" has the rows of public\.item'):
            operate(database, "outbox_capture", "other", type="item")
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('second', 'second')")
        with pytest.raises(CaptureError, match="captured already"):
            operate(database, "outbox_capture", "item", type="second")


def test_a_captured_type_is_not_removed_and_an_unknown_one_is_said(items: psycopg.Connection, database: str) -> None:
    """Without its type every write of the table would fail."""
    with pytest.raises(CaptureError, match=r'the entity type "item" cannot be removed.*public\.item') as caught:
        operate(database, "outbox_remove_type", "item")
    assert "outbox_release" in caught.value.cure
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        items.execute("DELETE FROM outbox.entity_types")
    with pytest.raises(UnknownTypeError, match="itme"):
        operate(database, "outbox_remove_type", "itme")


def test_a_type_that_is_not_registered_is_refused(database: str) -> None:
    """Its entries could not be published."""
    with pytest.raises(CaptureError, match='no entity type "nope"'):
        operate(database, "outbox_capture", "item", type="nope")


def test_a_state_over_the_limit_fails_in_the_writers_transaction(items: psycopg.Connection) -> None:
    """And names the entity and the cure."""
    items.execute("UPDATE outbox.entity_types SET max_bytes = 100")
    with pytest.raises(psycopg.Error, match='item "1"') as caught:
        items.execute("UPDATE item SET name = repeat('x', 1000) WHERE id = 1")
    assert caught.value.sqlstate == "OB003"


def test_release_ends_it(database: str, items: psycopg.Connection) -> None:
    """Entries and type stay; the table is free again."""
    operate(database, "outbox_release", "item")
    items.execute("UPDATE item SET name = 'x'")
    items.execute("TRUNCATE item")
    assert entries(items) == []
    assert items.execute("SELECT source FROM outbox.entity_types").fetchone() == (None,)
    assert capture_functions(items) == []
    operate(database, "outbox_capture", "item", type="item")


def capture_functions(connection: psycopg.Connection) -> list[str]:
    """The trigger functions that are there."""
    rows = connection.execute("SELECT proname FROM pg_proc WHERE proname LIKE 'capture\\_%'").fetchall()
    return [name for (name,) in rows]


def test_release_leaves_a_source_that_a_person_wrote(database: str) -> None:
    """Only what the capture derived goes with it."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE outbox.entity_types SET source = 'SELECT mine'")
        operate(database, "outbox_capture", "item", type="item")
        operate(database, "outbox_release", "item")
        assert connection.execute("SELECT source FROM outbox.entity_types").fetchone() == ("SELECT mine",)


@pytest.mark.parametrize(
    "change", ["DROP TABLE item", "ALTER TABLE item RENAME TO thing", "CREATE SCHEMA s; ALTER TABLE item SET SCHEMA s"]
)
def test_a_table_that_is_gone_or_renamed_is_released_by_its_former_name(
    items: psycopg.Connection, database: str, change: str
) -> None:
    """Otherwise the outbox could never be removed."""
    items.execute(change)
    with pytest.raises(CaptureError, match=r"cannot be removed while it publishes a table: public\.item"):
        operate(database, "outbox_drop")
    operate(database, "outbox_release", "item")
    assert capture_functions(items) == []
    assert items.execute("SELECT FROM pg_trigger WHERE tgname LIKE 'outbox%'").fetchall() == []
    operate(database, "outbox_drop")
    assert items.execute("SELECT to_regnamespace('outbox')").fetchone() == (None,)


def test_what_is_not_captured_cannot_be_released(items: psycopg.Connection, database: str) -> None:
    """And a renamed table's present name leads to the former one."""
    items.execute("ALTER TABLE item RENAME TO thing")
    with pytest.raises(CaptureError, match=r"captured under another name, public\.item") as caught:
        operate(database, "outbox_release", "thing")
    assert "op.outbox_release('item', table_schema='public')" in caught.value.cure
    with pytest.raises(CaptureError, match=r"public\.nope is not captured"):
        operate(database, "outbox_release", "nope")


def test_a_table_that_was_swapped_by_renaming_is_refused(items: psycopg.Connection) -> None:
    """Its trigger would publish the rows of the table that has the name now."""
    items.execute("ALTER TABLE item RENAME TO item_old")
    items.execute("CREATE TABLE item (LIKE item_old INCLUDING ALL)")
    with pytest.raises(psycopg.Error, match=r"public\.item_old was captured as public\.item") as caught:
        items.execute("UPDATE item_old SET name = 'x'")
    assert caught.value.sqlstate == "OB020"
    assert "op.outbox_release('item'" in (caught.value.diag.message_hint or "")
    assert entries(items) == []


def test_a_child_that_inherits_later_does_not_lend_its_rows(items: psycopg.Connection) -> None:
    """FROM ONLY: a row of the child is no row of the table, whatever its key."""
    items.execute("CREATE TABLE child () INHERITS (item)")
    items.execute("INSERT INTO child VALUES (1, 'child', 0, NULL)")
    items.execute("UPDATE ONLY item SET name = 'x' WHERE id = 1")
    items.execute("DELETE FROM ONLY item WHERE id = 1")
    assert [(key, state and state["name"]) for key, state in entries(items)] == [("1", "x"), ("1", None)]


def test_a_captured_table_is_captured_in_a_dump_and_load_too(
    items: psycopg.Connection, database: str, make_database: Any
) -> None:
    """The copy's tables have other oids: they are known by name."""
    copy = make_database()
    dump = subprocess.run(
        [bin_directory() / "pg_dump", "--dbname", database], capture_output=True, text=True, check=True
    ).stdout
    subprocess.run(
        [bin_directory() / "psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", copy],
        input=dump, text=True, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with psycopg.connect(copy, autocommit=True) as connection:
        connection.execute("UPDATE item SET name = 'copied' WHERE id = 1")
        assert entries(connection)[-1][1]["name"] == "copied"
    operate(copy, "outbox_release", "item")


def test_the_example_of_the_documentation_runs(outbox_database: str) -> None:
    """Every option, on a composite key and on a row that is not published."""
    page = (Path(__file__).parent.parent / "docs" / "writing.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(import outbox\.operations .*?)```", page, re.DOTALL)
    options = set(inspect.signature(outbox.operations.OutboxCapture.invoke).parameters) - {"operations", "schema"}
    assert all(option == "table" or f"{option}=" in example for option in options)
    with psycopg.connect(outbox_database, autocommit=True) as connection:
        connection.execute(
            """CREATE TABLE customer (id int PRIMARY KEY, name text); INSERT INTO customer VALUES (1, 'Ada');
               CREATE SCHEMA sales; CREATE TABLE sales.line (order_id int, number int, article text, price numeric,
                                                             note text, PRIMARY KEY (order_id, number));
               CREATE TABLE colour (id int, name text); INSERT INTO colour VALUES (1, 'red'), (2, 'blue');
               CREATE TABLE article (sku text PRIMARY KEY, name text, on_sale bool, colour_ids int[]);
               INSERT INTO article VALUES ('a', 'cup', true, '{1,2}'), ('b', 'pot', false, '{}')"""
        )
        engine = create_engine(outbox_database.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
        with engine.begin() as bind:
            exec(example, {"op": Operations(MigrationContext.configure(bind))})
        connection.execute("INSERT INTO sales.line VALUES (7, 3, 'a', 1.50, 'gift')")
        connection.execute("UPDATE sales.line SET note = 'none'")
        connection.execute("TRUNCATE sales.line")
        assert entries(connection) == [
            ("1", {"id": 1, "name": "Ada"}),
            ("a", {"name": "cup", "colours": ["blue", "red"]}),
            ("b", None),
            ("7:3", {"order_id": 7, "number": 3, "article": "a", "price": 1.5}),
            ("7:3", None),
        ]


def test_a_script_for_somebody_else_captures_and_releases_too(database: str) -> None:
    """Everything that is refused or looked up is so in SQL: `alembic upgrade --sql`."""
    script = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": script, "transactional_ddl": True}
    )
    op: Any = Operations(context)
    op.outbox_capture("item", type="item", state="to_jsonb(t.name || ':x %s')", truncate="tombstones")
    psql = [bin_directory() / "psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", database, "--file", "-"]
    run = partial(subprocess.run, input=script.getvalue(), text=True, capture_output=True, check=False)
    assert "LOCK TABLE can only be used in transaction blocks" in run(psql).stderr
    done = run([*psql, "--single-transaction"])
    assert done.returncode == 0, done.stderr
    with psycopg.connect(database, autocommit=True) as connection:
        assert entries(connection) == [("1", "one:x %s"), ("2", "two:x %s")]
        script.seek(0)
        script.truncate()
        op.outbox_release("item")
        done = run(psql, input=script.getvalue())
        assert done.returncode == 0, done.stderr
        assert capture_functions(connection) == []


def test_functions_of_tables_with_long_or_alike_names_differ() -> None:
    """PostgreSQL cuts names at 63 bytes; `a.b_c` and `a_b.c` read alike."""
    pairs = [("public", "é" * 40 + "1"), ("public", "é" * 40 + "2"), ("a", "b_c"), ("a_b", "c"), ("public", "x")]
    names = [Capture(table, "item", table_schema=schema).function_name for schema, table in pairs]
    assert len(set(names)) == len(pairs)
    assert all(len(name.encode()) <= 63 for name in names)
    assert names[-1].startswith("capture_public_x_")


def test_names_of_any_form_are_captured_and_released(database: str) -> None:
    """Quotes, percents, colons, dollars, backslashes."""
    odd = "We\"ird 'T %s :x $outbox$ \\"
    with psycopg.connect(database, autocommit=True) as connection:
        column = "Id '%s :y"
        connection.execute(
            f"CREATE TABLE {outbox_schema.quote(odd)} ({outbox_schema.quote(column)} int PRIMARY KEY)".encode()
        )
        connection.execute(f"INSERT INTO {outbox_schema.quote(odd)} VALUES (1)".encode())
        operate(database, "outbox_capture", odd, type="item", key=column, columns=[column], truncate="tombstones")
        connection.execute(f"TRUNCATE {outbox_schema.quote(odd)}".encode())
        assert entries(connection) == [("1", {column: 1}), ("1", None)]
        operate(database, "outbox_release", odd)


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """A role that owns nothing yet, and may make tables in public."""
    name = f"clerk_{database.rpartition('/')[2]}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN; GRANT CREATE ON SCHEMA public TO {name}".encode())
        yield name
        connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}".encode())


def test_a_policy_never_makes_a_tombstone_of_a_live_row(database: str, role: str) -> None:
    """A row that is hidden from the trigger's owner would look deleted: PostgreSQL raises instead."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE item OWNER TO {role}; ALTER SCHEMA outbox OWNER TO {role}".encode())
        connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA outbox TO {role}".encode())
        connection.execute(f"GRANT ALL ON ALL FUNCTIONS IN SCHEMA outbox TO {role}".encode())
        connection.execute("ALTER TABLE item ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        connection.execute("CREATE POLICY few ON item USING (id < 2) WITH CHECK (true)")
        url = database.replace("postgres@", f"{role}@")
        for existing_rows in (True, False):
            with pytest.raises(CaptureError, match="row security holds for clerk"):
                operate(url, "outbox_capture", "item", type="item", existing_rows=existing_rows)
        connection.execute("ALTER TABLE item NO FORCE ROW LEVEL SECURITY")
        operate(url, "outbox_capture", "item", type="item")
        connection.execute("ALTER TABLE item FORCE ROW LEVEL SECURITY")
        with psycopg.connect(url, autocommit=True) as owner, pytest.raises(psycopg.Error, match="row-level security"):
            owner.execute("UPDATE item SET name = 'x' WHERE id = 1")
        with pytest.raises(psycopg.Error, match="row-level security"):
            connection.execute("INSERT INTO item VALUES (7, 'seven', 7, NULL)")
        assert [key for key, state in entries(connection) if state is None] == []
        connection.execute("ALTER TABLE item NO FORCE ROW LEVEL SECURITY")
        connection.execute("INSERT INTO item VALUES (7, 'seven', 7, NULL)")
        assert entries(connection)[-1][1]["name"] == "seven"
        operate(database, "outbox_release", "item")
        # A superuser bypasses every policy.
        connection.execute("ALTER TABLE item FORCE ROW LEVEL SECURITY")
        operate(database, "outbox_capture", "item", type="item")


def test_nobody_else_can_fire_the_function(items: psycopg.Connection, role: str) -> None:
    """It runs as its owner: a table of somebody's own would write entries of the type."""
    (function,) = capture_functions(items)
    items.execute(f"GRANT USAGE ON SCHEMA outbox TO {role}".encode())
    with psycopg.connect(items.info.dsn.replace("user=postgres", f"user={role}"), autocommit=True) as connection:
        connection.execute("CREATE TABLE evil (id int PRIMARY KEY)")
        trigger = f"CREATE TRIGGER e AFTER INSERT ON evil FOR EACH ROW EXECUTE FUNCTION outbox.{function}()"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(trigger.encode())
    # Nor by a mistake of its owner.
    items.execute(trigger.encode())
    with pytest.raises(psycopg.Error, match=r"public\.evil was captured as public\.item"):
        items.execute("INSERT INTO evil VALUES (1)")


def test_a_table_of_another_owner_is_said_with_the_cure(database: str, role: str) -> None:
    """The migration's role is the one to change."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA outbox TO {role}".encode())
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA outbox TO {role}".encode())
    with pytest.raises(DatabaseError, match="denied") as caught:
        operate(database.replace("postgres@", f"{role}@"), "outbox_capture", "item", type="item")
    assert "as the owner of" in caught.value.cure


def test_a_writer_needs_no_privilege_on_the_outbox(items: psycopg.Connection) -> None:
    """The trigger runs as its owner; the domain's role changes the domain only."""
    items.execute("DROP ROLE IF EXISTS clerk")
    items.execute("CREATE ROLE clerk")
    items.execute("GRANT SELECT, UPDATE ON item TO clerk")
    items.execute("SET ROLE clerk")
    items.execute("UPDATE item SET name = 'x' WHERE id = 1")
    items.execute("RESET ROLE")
    assert len(entries(items)) == 1
    items.execute("DROP OWNED BY clerk")
    items.execute("DROP ROLE clerk")
