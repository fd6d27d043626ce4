"""Requests that read through a type's source: backfill and publish, by a relay as a user runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from consume import entry_id, live, records
from devstack.kafka import Kafka
from outbox import requests
from relays import RelayProcess, environment, eventually, must

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]

SOURCE = "SELECT id::text AS key, to_jsonb(c) AS state, id FROM customer c"


@dataclass
class Owner:
    """An owning service: a table of customers, an outbox, and its topic."""

    url: str
    name: str
    env: dict[str, str]
    kafka: Kafka
    directory: Path

    @property
    def topic(self) -> str:
        return f"{self.name}.customer"

    def sql(self, *statements: str) -> None:
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def add_type(self, source: str | None = SOURCE, *options: str) -> None:
        sourced = ["--source", source] if source is not None else []
        must(self.env, "types", "add", "customer", "--topic", self.topic, *sourced, *options)
        must(self.env, "topics", "apply", "--yes")

    @contextmanager
    def relay(self, **settings: object) -> Iterator[RelayProcess]:
        more = {f"OUTBOX_{key.upper()}": str(value) for key, value in settings.items()}
        with RelayProcess({**self.env, **more}, self.directory / "relay.log") as relay:
            relay.wait_event("relay.holds")
            yield relay
            assert relay.stop() == 0

    def ask(self, kind: str = "backfill", **arguments: Any) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return requests.ask(connection, "outbox", kind, {"type": "customer", **arguments})

    def outcome(self, number: int) -> Mapping[str, Any]:
        """What became of a request, once the relay says it."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return eventually(
                lambda: requests.find(connection, "outbox", number=number)[0].outcomes.get(0),
                what=f"the end of request {number}",
            )

    def table(self) -> dict[str, Any]:
        """What the topic must hold."""
        with psycopg.connect(self.url) as connection:
            return dict(connection.execute("SELECT id::text, to_jsonb(c) FROM customer c").fetchall())


@pytest.fixture
def owner(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path) -> Owner:
    url = make_outbox()
    made = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    made.sql(
        "CREATE TABLE customer (id bigint PRIMARY KEY, name text, version int NOT NULL DEFAULT 1)",
        "INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, 5000) n",
    )
    return made


def test_a_backfill_publishes_every_row_once_with_id_0(owner: Owner) -> None:
    """In pages, by the running relay, woken by the request."""
    owner.add_type()
    with owner.relay(poll_interval=3600):
        assert owner.outcome(owner.ask()) == {"rows": 5000, "refused": 0}
    found = records(owner.kafka, owner.topic)
    assert len(found) == 5000
    assert {entry_id(record) for record in found} == {0}
    assert live(owner.kafka, owner.topic).json == owner.table()


def test_a_condition_chooses_and_no_row_is_an_outcome_too(owner: Owner) -> None:
    """Over the source's columns, with a per cent sign."""
    owner.add_type()
    with owner.relay():
        assert owner.outcome(owner.ask(where="id % 1000 = 0"))["rows"] == 5
        assert owner.outcome(owner.ask(where="id < 0")) == {"rows": 0, "refused": 0}
    assert set(live(owner.kafka, owner.topic).values) == {"1000", "2000", "3000", "4000", "5000"}


def test_named_keys_are_published_as_the_table_has_them(owner: Owner) -> None:
    """A state, a tombstone for what is gone, also of a key that the column cannot hold."""
    owner.add_type()
    owner.sql("UPDATE customer SET version = 7 WHERE id = 2", "DELETE FROM customer WHERE id = 3")
    with owner.relay():
        assert owner.outcome(owner.ask("publish", keys=["1", "2", "3", "no-number"])) == {
            "rows": 4, "refused": 0, "tombstones": 2, "gone": [],
        }  # fmt: skip
    found = {(record.key or b"").decode(): record.value for record in records(owner.kafka, owner.topic)}
    assert [found["3"], found["no-number"]] == [None, None]
    assert live(owner.kafka, owner.topic).json == {k: v for k, v in owner.table().items() if k in {"1", "2"}}


def test_more_keys_than_one_batch_looks_up_are_published_in_several(owner: Owner) -> None:
    """The position says how far it is."""
    owner.add_type()
    with owner.relay():
        assert owner.outcome(owner.ask("publish", keys=[str(n) for n in range(1, 2501)]))["rows"] == 2500
    assert len(records(owner.kafka, owner.topic)) == 2500


def test_a_row_whose_state_fails_is_dead_lettered_by_name_and_the_rest_goes_on(owner: Owner) -> None:
    """In a page, and when it is named; mended, a retry publishes it."""
    owner.add_type("SELECT id::text AS key, jsonb_build_object('x', 100 / (id - 77)) AS state, id FROM customer")
    with owner.relay() as relay:
        assert owner.outcome(owner.ask()) == {"rows": 5000, "refused": 1}
        letter = relay.wait_event("relay.dead_letter")
        assert (letter["key"], letter["reason"], letter["message"].count("division by zero")) == ("77", "source", 1)
        assert owner.outcome(owner.ask("publish", keys=["76", "77"]))["refused"] == 1
        must(owner.env, "types", "change", "customer", "--source", SOURCE)
        assert '"retried":1' in must(owner.env, "dead-letters", "retry", "--type", "customer", "--json").replace(
            " ", ""
        )
    assert len(live(owner.kafka, owner.topic).values) == 5000
    assert live(owner.kafka, owner.topic).json["77"] == owner.table()["77"]


def test_a_source_that_a_migration_broke_ends_the_backfill_and_nothing_else(owner: Owner) -> None:
    """What the log has is published meanwhile and afterwards."""
    owner.add_type()
    owner.sql("ALTER TABLE customer RENAME COLUMN id TO number")
    with owner.relay():
        assert 'column "id" does not exist' in owner.outcome(owner.ask())["error"]
        owner.sql("""SELECT outbox.put('customer', '1', '{"live": true}')""")
        eventually(lambda: "1" in live(owner.kafka, owner.topic).values)


def test_a_backfill_that_is_paused_waits_and_goes_on_where_it_was(owner: Owner) -> None:
    """And a rate holds it back without holding back what is live."""
    owner.add_type()
    with owner.relay(), psycopg.connect(owner.url, autocommit=True) as connection:
        number = owner.ask(rate=1000)
        eventually(lambda: records(owner.kafka, owner.topic))
        requests.set_state(connection, "outbox", number, paused=True)
        owner.sql("""SELECT outbox.put('customer', 'live', '{}')""")
        eventually(lambda: "live" in live(owner.kafka, owner.topic).values)
        before = len(records(owner.kafka, owner.topic))
        assert before < 5001
        owner.sql("""SELECT outbox.put('customer', 'later', '{}')""")
        eventually(lambda: "later" in live(owner.kafka, owner.topic).values)
        assert len(records(owner.kafka, owner.topic)) <= before + 1
        requests.set_state(connection, "outbox", number, paused=False)
        assert owner.outcome(number)["rows"] == 5000
    assert len(live(owner.kafka, owner.topic).values) == 5002
    assert len(records(owner.kafka, owner.topic)) == 5002
