"""Requests that read through a type's source: backfill and publish, by a relay as a user runs it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest

from consume import entry_id, live, records
from devstack.kafka import Kafka
from outbox import capture, reader, requests
from outbox.capture import Capture
from outbox.config import Config
from outbox.kafka.reader import Record, bounds
from outbox.relay import Relay
from outbox.request import Found
from outbox.sourced import Sources
from outbox.wake import Wake
from owners import SOURCE, Owner, writing
from relays import RelayProcess, environment, eventually, must, outbox

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]


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


def _reaches(owner: Owner, offsets: int) -> bool:
    return sum(bounds(owner.kafka.bootstrap, {}, owner.topic)[1].values()) > offsets


def _has(owner: Owner, count: int) -> bool:
    return len(records(owner.kafka, owner.topic)) > count


def outbox_json(owner: Owner, *arguments: str) -> Any:
    return orjson.loads(must(owner.env, "backfill", *arguments, "--json"))


def test_the_command_starts_watches_lists_and_refuses_a_second(owner: Owner) -> None:
    """With the total; the second request for the same type names the first."""
    owner.add_type()
    assert outbox_json(owner, "start", "customer", "--dry-run") == {"request": None, "rows": 5000, "keys": None}
    number = outbox_json(owner, "start", "customer")["request"]
    second = outbox(owner.env, "backfill", "start", "customer")
    assert second.returncode == 78
    assert f"request {number} (running)" in second.stderr
    with owner.relay():
        done = outbox_json(owner, "watch", str(number))
        assert (done["rows"], done["total"], done["state"]) == (5000, 5000, "done")
        again = must(owner.env, "backfill", "start", "customer", "--where", "id <= 10", "--watch")
        assert again.strip() == "done: 10 rows"
        gone = must(owner.env, "backfill", "start", "customer", "--key", "7", "--key", "9999", "--dry-run")
        assert gone.strip() == "1 rows of customer would be published, 1 tombstones."
        eventually(lambda: {one["state"] for one in outbox_json(owner, "list")} == {"done"})
    assert [one["request"] for one in outbox_json(owner, "list")] == [number, number + 1]


def test_the_list_has_backfills_alone_and_what_is_over_is_closed(owner: Owner) -> None:
    """Not what replay handed over; the relay's batches look at what is open, and at one list of keys at a time."""
    owner.add_type()
    with owner.relay():
        for first in range(1, 40, 2):
            owner.ask("publish", keys=[str(first), str(first + 1)])
        number = outbox_json(owner, "start", "customer", "--key", "77")["request"]
        owner.outcome(number)
        assert [one["request"] for one in outbox_json(owner, "list")] == [number]
    found = {(record.key or b"").decode() for record in records(owner.kafka, owner.topic)}
    assert found == {*(str(n) for n in range(1, 41)), "77"}
    with psycopg.connect(owner.url) as connection:
        open_ones = connection.execute("SELECT count(*) FROM outbox.requests WHERE finished_at IS NULL").fetchone()
        connection.execute(
            "UPDATE outbox.requests SET finished_at = now() - interval '31 days' WHERE id < %s", [number]
        )
    assert open_ones == (0,)
    with owner.relay():
        owner.outcome(owner.ask("publish", keys=["1"]))
    with psycopg.connect(owner.url) as connection:
        left = connection.execute("SELECT count(*) FROM outbox.requests").fetchone()
    assert left == (2,)


def test_a_source_that_is_locked_for_a_moment_is_read_later(owner: Owner) -> None:
    """A migration that alters the table ends no backfill, and makes no tombstone."""
    owner.add_type()
    with psycopg.connect(owner.url) as migration, owner.relay(poll_interval=0.2):
        migration.execute("LOCK TABLE customer IN ACCESS EXCLUSIVE MODE")
        backfill, named = owner.ask(), owner.ask("publish", keys=["1", "2"])
        owner.sql("SELECT outbox.put('customer', 'live', '{}')")
        eventually(lambda: "live" in live(owner.kafka, owner.topic).values)
        assert len(records(owner.kafka, owner.topic)) == 1
        migration.commit()
        assert owner.outcome(backfill) == {"rows": 5000, "refused": 0}
        assert owner.outcome(named)["tombstones"] == 0


def test_keys_in_another_order_than_their_texts(owner: Owner) -> None:
    """Paged in the order of the index: by number within a text, in a language's collation where the server has one."""
    with psycopg.connect(owner.url) as connection:
        (collation,) = connection.execute(
            "SELECT coalesce(min(collname), 'default') FROM pg_collation"
            " WHERE collprovider IN ('i', 'c') AND collname ~ '^en'"
        ).fetchone() or ("",)
    owner.sql(
        "DROP TABLE customer",
        f'CREATE TABLE customer (name text COLLATE "{collation}", id int, PRIMARY KEY (name, id))',
        "INSERT INTO customer SELECT (ARRAY['ä', 'Z', 'a', 'A-', 'ß', 'a:b'])[1 + n % 6], n"
        " FROM generate_series(1, 3000) n",
    )
    key = r"replace(name, ':', '\:') || ':' || id"
    owner.add_type(f"SELECT {key} AS key, to_jsonb(c) AS state, name, id FROM customer c")
    with owner.relay(batch_rows=500):
        assert owner.outcome(owner.ask()) == {"rows": 3000, "refused": 0}
    assert len(records(owner.kafka, owner.topic)) == 3000
    with psycopg.connect(owner.url) as connection:
        there: dict[str, Any] = dict(
            connection.execute(f"SELECT {key}, to_jsonb(c) FROM customer c".encode()).fetchall()
        )
    assert live(owner.kafka, owner.topic).json == there


def test_two_backfills_of_different_types_take_turns(owner: Owner) -> None:
    """Neither waits for the other's end."""
    owner.add_type()
    other = f"{owner.name}.other"
    must(owner.env, "types", "add", "other", "--topic", other, "--source", SOURCE)
    must(owner.env, "topics", "apply", "--yes")
    with owner.relay(batch_rows=200):
        first = owner.ask()
        with psycopg.connect(owner.url, autocommit=True) as connection:
            second = requests.ask(connection, "outbox", "backfill", {"type": "other"})
        eventually(lambda: records(owner.kafka, other))
        with psycopg.connect(owner.url) as connection:
            over = connection.execute("SELECT count(*) FROM outbox.request_outcomes").fetchone()
        assert owner.outcome(first)["rows"] == owner.outcome(second)["rows"] == 5000
    assert over == (0,)
    assert len(live(owner.kafka, other).values) == len(live(owner.kafka, owner.topic).values) == 5000


def _history(owner: Owner, topic: str) -> list[tuple[int, str, Any]]:
    found = [
        (entry_id(r), (r.key or b"").decode(), orjson.loads(r.value) if r.value else None)
        for r in records(owner.kafka, topic)
    ]
    return sorted(found, key=lambda one: one[0])


def test_a_history_is_published_again_entry_by_entry(owner: Owner) -> None:
    """Of a type without collapse: in order for each key, under the old ids, up to the newest; killed, too."""
    owner.add_type(None, "--no-collapse", "--partitions", "1")
    owner.sql(
        "INSERT INTO outbox.entries (type, key, state) SELECT CASE n % 3 WHEN 0 THEN 'other' ELSE 'customer' END,"
        " 'k' || n % 10, convert_to(jsonb_build_object('n', n)::text, 'UTF8') FROM generate_series(1, 9000) n"
    )
    must(owner.env, "types", "add", "other", "--topic", f"{owner.name}.other")
    must(owner.env, "topics", "apply", "--yes")
    with RelayProcess({**owner.env, "OUTBOX_BATCH_ROWS": "500"}, owner.directory / "relay.log") as relay:
        eventually(lambda: len(records(owner.kafka, owner.topic)) == 6000)
        number = owner.ask("history", of="customer", keys=None, since=None, first_id=3001)
        for killed in (1, 2):
            eventually(partial(_has, owner, 6000 + killed * 1000))
            relay.kill()
            relay.start()
        assert owner.outcome(number) == {"rows": 4000, "refused": 0}
        told = orjson.loads(must(owner.env, "replay", "--type", "customer", "--history", "--key", "k1", "--json"))
        assert told["rows"] == 600
        assert relay.stop() == 0
    ids = [entry_id(record) for record in records(owner.kafka, owner.topic)]
    again = [n for n in range(3001, 9001) if n % 3]
    assert ids[:6000] == [n for n in range(1, 9001) if n % 3]
    assert ids[6000:10_000] == again
    assert ids[10_000:] == [n for n in range(1, 9001) if n % 3 and n % 10 == 1]
    for options in (["--until", "2026-01-01"], ["--id", "1:5"]):
        refused = outbox(owner.env, "replay", "--type", "customer", "--history", *options)
        assert (refused.returncode, "up to the newest" in refused.stderr) == (2, True)


def test_a_history_fills_another_topic_which_is_kept_in_step_from_then_on(owner: Owner) -> None:
    """Of a type that collapses, without a source; its own topic is not filled so."""
    owner.add_type(None)
    owner.sql("SELECT outbox.put('customer', 'k' || n % 10, jsonb_build_object('n', n)) FROM generate_series(1, 100) n")
    refused = outbox(owner.env, "replay", "--type", "customer", "--history")
    assert (refused.returncode, "customer collapses" in refused.stderr) == (2, True)
    other = f"{owner.name}.every"
    unknown = outbox(owner.env, "replay", "--type", "customer", "--to-topic", other)
    assert (unknown.returncode, "does not follow customer" in unknown.stderr) == (78, True)
    with owner.relay():
        eventually(lambda: len(records(owner.kafka, owner.topic)) == 10)
        told = must(owner.env, "replay", "--type", "customer", "--history", "--to-topic", other, "--json")
        assert orjson.loads(told)["rows"] == 100
        owner.sql("SELECT outbox.put('customer', 'k1', '{}')")
        eventually(lambda: len(records(owner.kafka, other)) == 101)
        again = must(owner.env, "replay", "--type", "customer", "--to-topic", other, "--key", "k2", "--json")
        assert orjson.loads(again)["rows"] == 1
    found = _history(owner, other)
    assert [(number, key) for number, key, _ in found][:92] == [(n, f"k{n % 10}") for n in range(1, 93)]
    assert live(owner.kafka, other).json == live(owner.kafka, owner.topic).json


def test_pause_resume_cancel(owner: Owner) -> None:
    """What was published stays; a cancelled one is not gone on with, and another may begin."""
    owner.add_type()
    number = str(outbox_json(owner, "start", "customer", "--rate", "500")["request"])
    with owner.relay():
        eventually(lambda: records(owner.kafka, owner.topic))
        said = orjson.loads(must(owner.env, "backfill", "pause", number, "--json"))
        assert said == {"request": int(number), "state": "paused"}
        assert outbox_json(owner, "list")[0]["state"] == "paused"
        must(owner.env, "backfill", "resume", number)
        must(owner.env, "backfill", "cancel", number)
        refused = outbox(owner.env, "backfill", "resume", number)
        assert (refused.returncode, f"Backfill {number} is cancelled" in refused.stderr) == (78, True)
        assert outbox_json(owner, "start", "customer", "--watch")["rows"] == 5000
    assert live(owner.kafka, owner.topic).json == owner.table()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "has no source"),
        ("SELECT (id / 2)::text AS key, to_jsonb(c) AS state, id / 2 AS half FROM customer c", "key of another: 1"),
        ("SELECT nullif(id, 3)::text AS key, to_jsonb(c) AS state, id FROM customer c", "1 rows without a key"),
        ("SELECT id::text AS key, to_jsonb(c) AS state, nullif(id, 3) AS id FROM customer c", "1 rows without a key"),
        ("SELECT 'C-' || id AS key, to_jsonb(c) AS state, id FROM customer c", "whose key is not made of id"),
    ],
)
def test_a_source_that_cannot_be_paged_is_refused_at_once(owner: Owner, source: str | None, said: str) -> None:
    """With the keys, before anything is asked for."""
    owner.add_type(source)
    refused = outbox(owner.env, "backfill", "start", "customer")
    assert refused.returncode == 78
    assert said in refused.stderr
    assert outbox_json(owner, "list") == []


def test_a_backfill_under_writers_with_the_relay_killed_is_exact(owner: Owner) -> None:
    """Killed again and again: the topic equals the table, versions only grow, each row comes from the backfill once."""
    owner.sql(
        "TRUNCATE customer",
        "INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, 200000) n",
        """CREATE FUNCTION change(one bigint) RETURNS void LANGUAGE sql AS $$
               UPDATE customer SET version = version + 1 WHERE id = one;
               SELECT outbox.put('customer', one::text, to_jsonb(c)) FROM customer c WHERE id = one $$""",
    )
    owner.add_type()

    def change(connection: psycopg.Connection, draw: random.Random) -> None:
        connection.execute("SELECT change(%s)", [draw.choice((draw.randint(1, 200), draw.randint(1, 200_000)))])

    # So slow that it is not over before the last kill.
    number = owner.ask(rate=20_000)
    with RelayProcess(owner.env, owner.directory / "relay.log") as relay:
        with writing(owner.url, 8, change):
            for killed in range(20):
                # At a place that differs from kill to kill.
                eventually(partial(_reaches, owner, killed * 9_000), seconds=120)
                relay.kill()
                relay.start()
            assert owner.outcome(number, seconds=300) == {"rows": 200_000, "refused": 0}
        assert relay.stop() == 0
    must(owner.env, "relay", "--until-caught-up")
    assert wrong_in(records(owner.kafka, owner.topic)) == []
    assert live(owner.kafka, owner.topic).json == owner.table()


def wrong_in(found: Sequence[Record]) -> list[str]:
    """What a consumer must not see: a key backfilled twice, a version that goes back."""
    backfilled = Counter(record.key for record in found if entry_id(record) == 0)
    wrong = [f"{key!r} is backfilled {times} times" for key, times in backfilled.items() if times > 1]
    versions: dict[bytes | None, int] = {}
    for record in found:
        version = orjson.loads(record.value or b"{}")["version"]
        if version < versions.get(record.key, 0):
            wrong.append(f"version {version} of {record.key!r} follows {versions[record.key]}")
        versions[record.key] = version
    return wrong


class Early(Sources):
    """A wrong way: its page is of an earlier snapshot than the batch that it is published with."""

    meanwhile: Callable[[], None]

    def find(self, *arguments: Any) -> Found:
        found = super().find(*arguments)
        if found.paged is None:
            return found
        if not hasattr(self, "_early"):
            self._early, self._calls = found, 0
            type(self).meanwhile()
        self._calls += 1
        # A batch without rows, one with the change that was made meanwhile, and then the page.
        return self._early if self._calls == 3 else replace(found, page=(), more=True)


def test_wrong_a_page_of_another_snapshot_is_seen_by_the_same_judge(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a relay would do that reads the table apart from the batch."""
    owner.sql("DELETE FROM customer WHERE id > 100")
    owner.add_type()
    monkeypatch.setattr(
        Early,
        "meanwhile",
        lambda: owner.sql(
            "UPDATE customer SET version = 2 WHERE id = 7",
            "SELECT outbox.put('customer', '7', to_jsonb(c)) FROM customer c WHERE id = 7",
        ),
        raising=False,
    )
    monkeypatch.setattr(reader, "Sources", Early)
    owner.ask()
    config = Config(database_url=owner.url, kafka_bootstrap_servers=owner.kafka.bootstrap, replication_factor=1)
    wake = Wake()
    relay = threading.Thread(target=Relay(config, wake=wake).run)
    relay.start()
    try:
        eventually(lambda: len(records(owner.kafka, owner.topic)) == 101)
    finally:
        wake.set()
        relay.join()
        wake.close()
    assert wrong_in(records(owner.kafka, owner.topic)) == ["version 1 of b'7' follows 2"]


def outbox_replay(owner: Owner, *arguments: str) -> Any:
    return orjson.loads(must(owner.env, "replay", "--type", "customer", *arguments, "--json"))


def test_a_captured_table_is_backfilled_with_the_bytes_that_its_trigger_writes(owner: Owner) -> None:
    """Its source is derived, and run under the trigger's settings, whatever the session's are."""
    owner.sql(
        "DROP TABLE customer",
        "CREATE TABLE customer (a text, b date, weight float8, at timestamptz, raw bytea, PRIMARY KEY (a, b))",
        r"INSERT INTO customer SELECT 'x:' || n, '2026-01-31', n / 3.0, '2026-01-31 12:00+05', '\x00ff'"
        " FROM generate_series(1, 5) n",
    )
    owner.add_type(None)
    with psycopg.connect(owner.url) as connection:
        for statement in capture.statements(Capture("customer", "customer", key=("a", "b")), existing_rows=True):
            connection.execute(statement.encode())
    with psycopg.connect(owner.url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET datestyle = 'German'".encode())
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'".encode())
    with owner.relay():
        eventually(lambda: len(records(owner.kafka, owner.topic)) == 5)
        assert owner.outcome(owner.ask()) == {"rows": 5, "refused": 0}
    found = records(owner.kafka, owner.topic)
    triggered = {record.key: record.value for record in found if entry_id(record)}
    assert {record.key: record.value for record in found if not entry_id(record)} == triggered
    assert len(triggered) == 5


@pytest.fixture
def replayed(owner: Owner) -> Owner:
    """Entries 1 to 5 of keys 1 to 5, published; then key 2 is changed and key 3 deleted, published as well."""
    owner.add_type()
    owner.sql(
        "SELECT outbox.put('customer', n::text, to_jsonb(c)) FROM generate_series(1, 5) n, customer c WHERE c.id = n"
    )
    owner.sql(
        "UPDATE customer SET version = 2 WHERE id = 2",
        "SELECT outbox.put('customer', '2', to_jsonb(c)) FROM customer c WHERE id = 2",
        "DELETE FROM customer WHERE id = 3",
        "SELECT outbox.delete('customer', '3')",
    )
    must(owner.env, "relay", "--until-caught-up")
    return owner


def again(owner: Owner, before: int) -> dict[str, Any]:
    """What was published since the first so many records, by key."""
    found = sorted(records(owner.kafka, owner.topic), key=lambda record: record.timestamp_ms)[before:]
    return {(r.key or b"").decode(): orjson.loads(r.value) if r.value else None for r in found}


@pytest.mark.parametrize(
    ("selector", "keys"),
    [
        ([], {"1", "2", "3", "4", "5"}),
        (["--key", "1", "--key", "3"], {"1", "3"}),
        (["--id", "2:3"], {"2", "3"}),
        (["--id", "6:"], {"2", "3"}),
        (["--since", "2020-01-01"], {"1", "2", "3", "4", "5"}),
        (["--until", "2020-01-01"], set()),
        (["--key", "5000"], {"5000"}),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_replay_publishes_the_chosen_keys_as_the_table_has_them(
    replayed: Owner, selector: list[str], keys: set[str]
) -> None:
    """By key, id, time; a dry run counts and asks for nothing."""
    before = len(records(replayed.kafka, replayed.topic))
    assert outbox_replay(replayed, *selector, "--dry-run")["keys"] == len(keys)
    with replayed.relay():
        assert outbox_replay(replayed, *selector).get("rows", 0) == len(keys)
    found = again(replayed, before)
    assert set(found) == keys
    assert {key: state for key, state in found.items() if state} == {
        key: state for key, state in replayed.table().items() if key in keys
    }


def test_a_replay_without_a_source_publishes_the_last_retained_entry(owner: Owner) -> None:
    """Never the one that was chosen, if there is a newer; what is not retained is said."""
    owner.add_type(None)
    owner.sql(
        """SELECT outbox.put('customer', '1', '{"v": 1}')""",
        """SELECT outbox.put('customer', '2', '{"v": 1}')""",
        """SELECT outbox.put('customer', '1', '{"v": 2}')""",
    )
    must(owner.env, "relay", "--until-caught-up")
    with owner.relay():
        assert outbox_replay(owner, "--id", "1:1")["rows"] == 1
        assert outbox_replay(owner, "--key", "2", "--key", "gone")["not_retained"] == ["gone"]
        assert outbox_replay(owner, "--key", "2", "--key", "gone", "--dry-run")["not_retained"] == ["gone"]
    found = [((r.key or b"").decode(), orjson.loads(r.value or b"")["v"]) for r in records(owner.kafka, owner.topic)]
    assert sorted(found) == [("1", 2), ("1", 2), ("2", 1), ("2", 1)]


def test_of_several_shards_each_publishes_its_own_keys(
    make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path
) -> None:
    """A backfill and named keys: every row once, counted once."""
    url = make_outbox(shards=2)
    owner = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    owner.sql(
        "CREATE TABLE customer (id bigint PRIMARY KEY, name text, version int NOT NULL DEFAULT 1)",
        "INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, 1000) n",
    )
    owner.add_type()
    with owner.relay(), RelayProcess({**owner.env, "OUTBOX_SHARD": "1"}, tmp_path / "second.log") as second:
        second.wait_event("relay.holds")
        assert outbox_json(owner, "start", "customer", "--watch")["rows"] == 1000
        assert len(records(kafka, owner.topic)) == 1000
        assert outbox_replay(owner, "--key", "1", "--key", "2", "--key", "3", "--key", "4", "--key", "x") == {
            "entries": 0, "rows": 5, "refused": 0, "tombstones": 1, "not_retained": [],
        }  # fmt: skip
        assert second.stop() == 0
    assert len(records(kafka, owner.topic)) == 1005


def test_a_source_whose_key_is_not_made_of_its_columns_gives_no_tombstone(owner: Owner) -> None:
    """Looked up by those columns it would seem to be gone."""
    owner.add_type("SELECT 'C-' || id AS key, to_jsonb(c) AS state, id FROM customer c")
    with owner.relay():
        assert "is not made of id" in owner.outcome(owner.ask("publish", keys=["C-1"]))["error"]
    assert records(owner.kafka, owner.topic) == []


def test_a_lookup_that_takes_too_long_ends_the_request_and_gives_no_tombstone(owner: Owner) -> None:
    """Nor does it hold up what is live for long."""
    owner.add_type("SELECT id::text AS key, jsonb_build_object('x', pg_sleep(60)::text) AS state, id FROM customer")
    with owner.relay():
        number = owner.ask("publish", keys=["1"])
        assert "it took longer than 10 s" in owner.outcome(number)["error"]
        owner.sql("""SELECT outbox.put('customer', 'live', '{}')""")
        eventually(lambda: records(owner.kafka, owner.topic))
    assert [record.key for record in records(owner.kafka, owner.topic)] == [b"live"]


def test_a_source_that_is_changed_ends_the_backfill_that_goes_on(owner: Owner) -> None:
    """Where its page ended says nothing of another order."""
    owner.add_type("SELECT id::text AS key, to_jsonb(c) AS state FROM customer c")
    with owner.relay():
        number = owner.ask(rate=500)
        eventually(lambda: records(owner.kafka, owner.topic))
        must(owner.env, "types", "change", "customer", "--source", SOURCE)
        assert "changed meanwhile" in owner.outcome(number)["error"]


def test_more_failing_rows_than_may_be_dead_lettered_end_the_request_alone(owner: Owner) -> None:
    """Neither does the relay stop, nor a topic that is missing get letters."""
    owner.add_type("SELECT id::text AS key, NULL::jsonb AS state, id FROM customer")
    with owner.relay(max_dead_letters=100):
        assert "max_dead_letters, 100" in owner.outcome(owner.ask())["error"]
        must(owner.env, "types", "add", "nowhere", "--topic", f"{owner.name}.nowhere", "--source", SOURCE)
        with psycopg.connect(owner.url, autocommit=True) as connection:
            number = requests.ask(connection, "outbox", "backfill", {"type": "nowhere"})
        assert "is missing" in owner.outcome(number)["error"]
        owner.sql("""SELECT outbox.put('customer', 'live', '{}')""")
        eventually(lambda: records(owner.kafka, owner.topic))


def test_keys_of_padded_and_odd_types_are_paged_to_their_end(owner: Owner) -> None:
    """A cast without its length would cut them."""
    owner.sql(
        "CREATE TYPE colour AS ENUM ('red', 'green')",
        "CREATE TABLE odd (code char(10), flags bit(3), c colour, PRIMARY KEY (code, flags, c))",
        "INSERT INTO odd SELECT 'C' || lpad(n::text, 9, '0'), '101', 'green' FROM generate_series(1, 1200) n",
    )
    owner.add_type("SELECT code || ':' || flags || ':' || c AS key, to_jsonb(o) AS state, code, flags, c FROM odd o")
    with owner.relay(batch_rows=500):
        assert owner.outcome(owner.ask())["rows"] == 1200
        assert owner.outcome(owner.ask("publish", keys=["C000000007:101:green"]))["tombstones"] == 0
    assert len(records(owner.kafka, owner.topic)) == 1201
