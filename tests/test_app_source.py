"""A backfill by the service's own code: exact under writers, goes on where it was, and what is wrong is seen."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors as pg
from sqlalchemy import orm

from consume import live
from devstack.kafka import Kafka
from outbox import app_source, requests
from outbox.app_source import AppSource
from owners import Owner, writing
from relays import OUTBOX, environment, eventually, must, outbox

pytestmark = pytest.mark.postgres

ROWS = 4_000
APP = """
import os
import sqlalchemy as sa
from sqlalchemy import orm
from outbox import AppSource

Session = orm.sessionmaker(sa.create_engine(os.environ["SHOP_URL"]))


class Base(orm.DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str]
    version: orm.Mapped[int]


def build(session, customer):
    return {"id": customer.id, "name": customer.name, "version": customer.version}


def fails(session, customer):
    if customer.id == 7:
        session.execute(sa.text("SELECT 1 / 0"))
    return None if customer.id == 8 else build(session, customer)


customers = AppSource("customer", sessions=Session, select=sa.select(Customer), state=build)
failing = AppSource("customer", sessions=Session, select=sa.select(Customer).where(Customer.id < 10), state=fails)
lines = sa.table("line", sa.column("customer", sa.Text), sa.column("number", sa.Integer), sa.column("what", sa.Text))
of_lines = AppSource("line", sessions=Session, select=sa.select(lines.c.what), key=(lines.c.customer, lines.c.number),
                     state=lambda session, what: {"what": what})
nothing = 7
"""


@pytest.fixture
def owner(make_outbox: Callable[..., str], tmp_path: Path) -> Owner:
    url = make_outbox()
    return _owner(url, "test", "127.0.0.1:1", tmp_path)


def _owner(url: str, name: str, bootstrap: str, directory: Path) -> Owner:
    (directory / "shop.py").write_text(APP)
    env = environment(url, bootstrap) | {
        "PYTHONPATH": str(directory),
        "SHOP_URL": url.replace("postgresql://", "postgresql+psycopg://"),
    }
    made = Owner(url, name, env, None, directory)  # type: ignore[arg-type]  # the topic is looked at in one test alone
    made.sql(
        "CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL, version int NOT NULL DEFAULT 1)",
        f"INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, {ROWS}) n",
        """CREATE FUNCTION change(one bigint) RETURNS void LANGUAGE sql AS $$
               UPDATE customer SET version = version + 1 WHERE id = one;
               SELECT outbox.put('customer', one::text, to_jsonb(c)) FROM customer c WHERE id = one $$""",
        "INSERT INTO outbox.entity_types (name, topic) VALUES ('customer', 'test.customer'), ('line', 'test.line')",
    )
    return made


def start(owner: Owner, name: str, *options: str, of: str = "customer") -> subprocess.CompletedProcess[str]:
    return outbox(owner.env, "backfill", "start", of, "--app", f"shop:{name}", *options)


def entries(owner: Owner, of: str = "customer") -> list[tuple[int, str, Any]]:
    """Id, key, state of each entry, in id order."""
    with psycopg.connect(owner.url) as connection:
        return connection.execute(
            "SELECT id, key, convert_from(state, 'UTF8')::jsonb FROM outbox.entries WHERE type = %s ORDER BY id", [of]
        ).fetchall()


def stale(owner: Owner) -> list[str]:
    """Keys whose last entry is not what the table has, or whose version goes back from one entry to the next."""
    last: dict[str, Any] = {}
    wrong: list[str] = []
    for _, key, state in entries(owner):
        if state is not None and key in last and state["version"] < last[key]["version"]:
            wrong.append(key)
        last[key] = state
    return wrong + [key for key, state in owner.table().items() if last.get(key) != state]


def test_every_row_is_written_by_the_services_own_code(owner: Owner) -> None:
    """With a count, and the request among the others."""
    assert start(owner, "customers", "--dry-run").stdout.strip() == f"{ROWS:,} rows of customer would be written."
    assert entries(owner) == []
    done = start(owner, "customers", "--json")
    assert (done.returncode, orjson.loads(done.stdout)) == (
        0,
        {"request": 1, "state": "done", "rows": ROWS, "refused": 0, "examples": []},
    )
    assert len(entries(owner)) == ROWS
    assert stale(owner) == []
    assert orjson.loads(start(owner, "customers", "--json").stdout)["request"] == 2


@pytest.mark.kafka
def test_under_writers_and_killed_it_is_exact(
    make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path
) -> None:
    """The same command goes on behind the last chunk; no row is written twice by it, none becomes older."""
    owner = _owner(make_outbox(), outbox_name, kafka.bootstrap, tmp_path)
    owner.kafka = kafka
    owner.sql(f"UPDATE outbox.entity_types SET topic = '{owner.topic}' WHERE name = 'customer'")
    must(owner.env, "topics", "apply", "--yes")

    def change(connection: psycopg.Connection, draw: random.Random) -> None:
        connection.execute("SELECT change(%s)", [draw.choice((draw.randint(1, 40), draw.randint(1, ROWS)))])

    command = [str(OUTBOX), "backfill", "start", "customer", "--app", "shop:customers", "--rate", "2000"]
    with writing(owner.url, 8, change):
        for killed in range(4):
            with subprocess.Popen(command, env=owner.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
                eventually(partial(_more_than, owner, killed * 500), seconds=120)
                run.kill()
        done = orjson.loads(must(owner.env, *command[1:], "--json"))
    assert (done["request"], done["rows"], done["state"]) == (1, ROWS, "done")
    assert _written(owner) == ROWS
    assert stale(owner) == []
    must(owner.env, "relay", "--until-caught-up")
    assert live(kafka, owner.topic).json == owner.table()


def _more_than(owner: Owner, count: int) -> bool:
    return _written(owner) > count


def _written(owner: Owner) -> int:
    with psycopg.connect(owner.url) as connection:
        row = connection.execute("SELECT count(*) FROM outbox.entries WHERE cause = 'backfill'").fetchone()
    return row[0] if row else 0


class Base(orm.DeclarativeBase):
    """Of the tables that are mapped here."""


class Customer(Base):
    """A row of the owner's table."""

    __tablename__ = "customer"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str]
    version: orm.Mapped[int]


class KeyShare(AppSource):
    """A wrong way: the lock lets an update through."""

    def lock(self, after: Any, rows: int) -> sa.Select[*tuple[Any, ...]]:
        return super().lock(after, rows).with_for_update(read=True, key_share=True)


class ReadBefore(AppSource):
    """A wrong way: it reads, and then locks."""

    def lock(self, after: Any, rows: int) -> sa.Select[*tuple[Any, ...]]:
        return sa.select(Customer.id).order_by(Customer.id).limit(rows)


@pytest.mark.parametrize(("kind", "blocked"), [(AppSource, True), (KeyShare, False), (ReadBefore, False)])
def test_a_change_between_the_reading_and_the_entry_waits(owner: Owner, kind: type[AppSource], blocked: bool) -> None:
    """The lock holds it up; with a weaker one, or one that comes later, the older state gets the greater id."""
    owner.sql("DELETE FROM customer WHERE id > 3")
    url = owner.url.replace("postgresql://", "postgresql+psycopg://")
    waited: list[bool] = []

    def build(session: orm.Session, customer: Customer) -> dict[str, Any]:
        state = {"id": customer.id, "name": customer.name, "version": customer.version}
        if customer.id == 2:
            with psycopg.connect(owner.url) as other:
                other.execute("SET lock_timeout = '100ms'")
                try:
                    other.execute("SELECT change(2)")
                    waited.append(False)
                except pg.LockNotAvailable:
                    waited.append(True)
        if kind is ReadBefore:
            session.execute(sa.text("SELECT FROM customer WHERE id = :id FOR SHARE"), {"id": customer.id})
        return state

    with psycopg.connect(owner.url, autocommit=True) as connection:
        number = requests.ask_backfill(connection, "outbox", {"type": "customer"}, shards=1, kind="app")
    engine = sa.create_engine(url)
    try:
        source = kind("customer", sessions=orm.sessionmaker(engine), select=sa.select(Customer), state=build)
        chunks = list(app_source.run(source, number, schema="outbox", rows=lambda: 100))
    finally:
        engine.dispose()
    assert chunks[-1].done
    assert waited == [blocked]
    assert stale(owner) == ([] if blocked else ["2", "2"])


class Address(Base):
    """What belongs to a customer."""

    __tablename__ = "address"
    customer: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("customer.id"), primary_key=True)
    street: orm.Mapped[str]


def test_what_is_joined_is_as_new_as_the_lock(owner: Owner) -> None:
    """The chunk waits for a writer; what its own statement had read of other tables before is not what is written."""
    owner.sql(
        "DELETE FROM customer WHERE id > 3",
        "CREATE TABLE address (customer bigint PRIMARY KEY REFERENCES customer, street text NOT NULL)",
        "INSERT INTO address SELECT id, 'old' FROM customer",
    )
    engine = sa.create_engine(owner.url.replace("postgresql://", "postgresql+psycopg://"))
    select = sa.select(Address.street, Customer).join(Customer, Customer.id == Address.customer)
    joined = AppSource(
        "customer",
        sessions=orm.sessionmaker(engine),
        select=select,
        key=(Customer.id,),
        state=lambda _session, street: {"street": street},
    )
    with psycopg.connect(owner.url, autocommit=True) as connection:
        number = requests.ask_backfill(connection, "outbox", {"type": "customer"}, shards=1, kind="app")
    chunks: list[app_source.Chunk] = []
    run = threading.Thread(
        target=lambda: chunks.extend(app_source.run(joined, number, schema="outbox", rows=lambda: 100))
    )
    with psycopg.connect(owner.url) as writer:
        writer.execute("UPDATE customer SET version = version + 1 WHERE id = 2")
        run.start()
        with psycopg.connect(owner.url, autocommit=True) as look:
            eventually(
                lambda: look.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (0,),
                what="the chunk waits",
            )
        writer.execute("UPDATE address SET street = 'new' WHERE customer = 2")
    run.join()
    engine.dispose()
    assert chunks[-1].done
    assert [state for _, key, state in entries(owner) if key == "2"] == [{"street": "new"}]


def test_a_row_that_somebody_holds_does_not_hold_the_others_up(owner: Owner) -> None:
    """The chunk gives its locks back and is tried again, in smaller ones, until the row is free."""
    with psycopg.connect(owner.url) as holder:
        holder.execute("UPDATE customer SET version = version + 1 WHERE id = 3000")
        command = [str(OUTBOX), "backfill", "start", "customer", "--app", "shop:customers"]
        with subprocess.Popen(command, env=owner.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            eventually(lambda: _written(owner) >= 2990)
            with psycopg.connect(owner.url) as other:
                other.execute("SET lock_timeout = '20s'")
                other.execute("SELECT change(3001)")
            holder.rollback()
            assert run.wait(60) == 0, run.stderr
    assert stale(owner) == []


def test_a_state_that_cannot_be_written_is_its_rows_alone(owner: Owner) -> None:
    """No number, or too large: named like any that fails."""
    owner.sql("UPDATE outbox.entity_types SET max_bytes = 1000 WHERE name = 'customer'")
    (owner.directory / "odd.py").write_text(
        "from shop import *\n"
        "def state(session, c):\n"
        "    return {'x': float('nan') if c.id == 3 else 'y' * (2000 if c.id == 4 else 1)}\n"
        "few = sa.select(Customer).where(Customer.id < 6)\n"
        "odd = AppSource('customer', sessions=Session, select=few, state=state)\n"
    )
    done = outbox(owner.env, "backfill", "start", "customer", "--app", "odd:odd", "--json")
    told = orjson.loads(done.stdout)
    assert (done.returncode, told["rows"], told["refused"]) == (1, 5, 2)
    assert [one["key"] for one in told["examples"]] == ["3", "4"]
    assert [key for _, key, _ in entries(owner)] == ["1", "2", "5"]


def test_another_source_does_not_go_on_where_one_was_paused(owner: Owner) -> None:
    """Its rows would be skipped."""
    with psycopg.connect(owner.url, autocommit=True) as connection:
        requests.ask_backfill(connection, "outbox", {"type": "customer", "app": "shop:failing"}, shards=1, kind="app")
    refused = start(owner, "customers")
    assert (refused.returncode, "by shop:failing, not by shop:customers" in refused.stderr) == (78, True)
    assert start(owner, "failing").returncode == 1


def test_a_row_whose_state_fails_is_named_and_the_others_go_on(owner: Owner) -> None:
    """Also when a statement of its own ended the transaction; None is a tombstone. Exit 1."""
    done = start(owner, "failing", "--json")
    assert done.returncode == 1
    told = orjson.loads(done.stdout)
    assert (told["rows"], told["refused"], told["state"]) == (9, 1, "done")
    assert told["examples"][0]["key"] == "7"
    assert "division by zero" in told["examples"][0]["reason"]
    assert [(key, state is None) for _, key, state in entries(owner)] == [
        (str(n), n == 8) for n in range(1, 10) if n != 7
    ]


def test_a_composite_key_of_a_table_without_a_mapping(owner: Owner) -> None:
    """Paged in the order of its columns, whatever their texts' order is."""
    owner.sql(
        "CREATE TABLE line (customer text, number int, what text, PRIMARY KEY (customer, number))",
        "INSERT INTO line SELECT 'c:' || n % 7, n, 'w' || n FROM generate_series(1, 700) n",
    )
    assert start(owner, "of_lines", of="line").returncode == 0
    found = entries(owner, "line")
    assert len(found) == 700
    assert {key for _, key, _ in found} == {rf"c\:{n % 7}:{n}" for n in range(1, 701)}


def test_it_is_paused_and_cancelled_like_any_other(owner: Owner) -> None:
    """The process ends at the next chunk; the command goes on with what was paused, and begins anew after a cancel."""
    command = [str(OUTBOX), "backfill", "start", "customer", "--app", "shop:customers", "--rate", "1000", "--json"]

    def run(then: str) -> Any:
        with subprocess.Popen(command, env=owner.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            before = _written(owner)
            eventually(lambda: _written(owner) > before)
            must(owner.env, "backfill", then, "1")
            out, _ = process.communicate(timeout=60)
        return orjson.loads(out)

    assert run("pause")["state"] == "paused"
    refused = outbox(owner.env, "backfill", "start", "customer", "--key", "1", "--dry-run")
    assert refused.returncode == 78  # it has no source that the relay could read
    told = run("cancel")
    assert (told["request"], told["state"]) == (1, "cancelled")
    assert orjson.loads(start(owner, "customers", "--json").stdout)["request"] == 2
    assert stale(owner) == []


@pytest.mark.parametrize(
    ("name", "of", "said"),
    [
        ("nothing", "customer", "is a int, no outbox.AppSource"),
        ("gone", "customer", "has no gone"),
        ("of_lines", "customer", "is of the type line, not customer"),
        ("customers", "other", 'There is no entity type "other"'),
    ],
)
def test_what_is_no_source_of_the_type_is_refused(owner: Owner, name: str, of: str, said: str) -> None:
    """Before anything is asked for."""
    refused = start(owner, name, of=of)
    assert refused.returncode in {1, 65, 78}
    assert said in refused.stderr
    assert entries(owner) == []


def test_a_module_that_cannot_be_imported_is_named(owner: Owner) -> None:
    """With where to run it."""
    refused = outbox(owner.env, "backfill", "start", "customer", "--app", "no_such:thing")
    assert refused.returncode == 78
    assert "No module named 'no_such'" in refused.stderr
    assert sys.executable not in refused.stderr
