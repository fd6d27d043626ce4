"""Capture: a trigger publishes a table, whatever changes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

import outbox.operations
from outbox.errors import CaptureError

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


def operate(url: str, name: str, *arguments: Any, **options: Any) -> None:
    """Call an operation as a revision does."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
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


def test_an_expression_may_make_the_state(database: str) -> None:
    """Over the row `t`."""
    state = "jsonb_build_object('label', t.name || '!')"
    operate(database, "outbox_capture", "item", type="item", state=state)
    with psycopg.connect(database) as connection:
        assert entries(connection) == [("1", {"label": "one!"}), ("2", {"label": "two!"})]


def test_the_derived_source_equals_the_trigger_byte_for_byte(items: psycopg.Connection) -> None:
    """Reconcile compares the two."""
    items.execute("UPDATE item SET price = price")
    row = items.execute("SELECT source FROM outbox.entity_types").fetchone()
    assert row is not None
    by_source = items.execute(row[0]).fetchall()
    by_trigger = items.execute("SELECT key, convert_from(state, 'UTF8') FROM outbox.entries ORDER BY id").fetchall()
    assert sorted(by_source) == sorted(by_trigger)


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
