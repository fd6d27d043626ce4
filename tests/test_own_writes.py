"""Read your own writes: from the owner's commit, by the outbox, its relay and Kafka, to the consumer's row."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import MetaData, select

import outbox
from devstack.kafka import Kafka
from outbox.read_model import Copy, Follow, PostgresStore, ReadModel, copy_table
from owners import Owner, writing
from relays import environment

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]
COPY = copy_table(MetaData(), "customer_copy")


@pytest.fixture
def owner(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path) -> Owner:
    """An owner of customers, with a relay's environment."""
    url = make_outbox()
    made = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    made.sql("CREATE TABLE customer (id bigint PRIMARY KEY, name text, version int NOT NULL DEFAULT 1)")
    made.add_type(None)
    return made


def changed(connection: psycopg.Connection, number: int, name: str | None) -> int:
    """A change of a customer (None: deleted) and its entry, in one transaction; the entry's id."""
    with connection.transaction():
        if name is None:
            connection.execute("DELETE FROM customer WHERE id = %s", [number])
            return outbox.delete(connection, "customer", number)
        connection.execute(
            "INSERT INTO customer (id, name) VALUES (%s, %s) ON CONFLICT (id)"
            " DO UPDATE SET name = excluded.name, version = customer.version + 1",
            [number, name],
        )
        row = connection.execute("SELECT to_jsonb(c) FROM customer c WHERE id = %s", [number]).fetchone()
        assert row is not None
        return outbox.put(connection, "customer", number, row[0])


def test_what_was_committed_is_read_once_it_is_waited_for(
    owner: Owner, make_database: Callable[..., str], kafka: Kafka
) -> None:
    """An insert, updates and a delete, beside other writers; at the end the copy is the owner's table."""
    store = PostgresStore(make_database())
    follow = Follow(owner.topic, Copy(COPY), type="customer")
    model = ReadModel(owner.name, store, [follow], bootstrap=kafka.bootstrap, check_seconds=0.1)
    store.create(model.declared)

    def copied() -> dict[str, Any]:
        with store.engine.connect().execution_options(reads=True) as connection:
            return {row.key: row.state for row in connection.execute(select(COPY.c.key, COPY.c.state))}

    def by_others(connection: psycopg.Connection, draw: random.Random) -> None:
        changed(connection, draw.randrange(10, 60), "by somebody")

    with (
        owner.relay(),
        model.running() as copies,
        psycopg.connect(owner.url, autocommit=True) as connection,
    ):
        copies.wait_ready(60)
        with writing(owner.url, 2, by_others, pause=0.01):
            for n in range(30):
                copies.wait_for("customer", "7", changed(connection, 7, f"name {n}"), timeout=60)
                assert copied()["7"]["name"] == f"name {n}"
                if n % 10 == 9:
                    copies.wait_for("customer", "7", changed(connection, 7, None), timeout=60)
                    assert "7" not in copied()
        copies.wait_for("customer", "5", changed(connection, 5, "the last"), timeout=60)
        copies.wait_for("customer", "9", changed(connection, 9, "of each partition"), timeout=60)
        for number in range(10, 60):
            copies.wait_for("customer", str(number), changed(connection, number, "settled"), timeout=60)
        assert copied() == owner.table()
