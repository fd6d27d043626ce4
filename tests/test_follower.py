"""Another topic for the same entities: filled beside the live changes, kept in step, switched to without a gap."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest

import outbox as outbox_package
from consume import entry_id, live, records
from devstack.kafka import Kafka
from devstack.postgres import Postgres
from outbox import follower
from outbox.config import Config
from outbox.entity_types import read_types
from outbox.position import start
from outbox.reader import Reader
from outbox.request import Row
from owners import Owner, writing
from relays import RelayProcess, environment, eventually, must, outbox

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]

ROWS = 3_000
SHAPE = "SELECT id::text AS key, jsonb_build_object('called', name, 'version', version) AS state, id FROM customer"


@pytest.fixture
def owner(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path) -> Owner:
    url = make_outbox()
    made = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    _tables(made)
    made.add_type()
    return made


def _tables(owner: Owner) -> None:
    owner.sql(
        "CREATE TABLE customer (id bigint PRIMARY KEY, name text, version int NOT NULL DEFAULT 1)",
        f"INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, {ROWS}) n",
        """CREATE FUNCTION change(one bigint) RETURNS void LANGUAGE sql AS $$
               UPDATE customer SET version = version + 1 WHERE id = one;
               SELECT outbox.put('customer', one::text, to_jsonb(c)) FROM customer c WHERE id = one $$""",
        """CREATE FUNCTION remove(one bigint) RETURNS void LANGUAGE sql AS $$
               DELETE FROM customer WHERE id = one;
               SELECT outbox.delete('customer', one::text) $$""",
    )


def version_2(owner: Owner) -> str:
    return f"{owner.topic}.v2"


def fill(owner: Owner, *options: str) -> Any:
    arguments = ("backfill", "start", "customer", "--to-topic", version_2(owner), *options, "--json")
    return orjson.loads(must(owner.env, *arguments))


def switch(owner: Owner, *options: str) -> Any:
    arguments = ("topics", "switch", "customer", "--to-topic", version_2(owner), "--yes", *options, "--json")
    return orjson.loads(must(owner.env, *arguments))


def shaped(owner: Owner) -> dict[str, Any]:
    """What a topic of the new shape must hold."""
    with psycopg.connect(owner.url) as connection:
        return dict(connection.execute(f"SELECT key, state FROM ({SHAPE}) s".encode()).fetchall())


def writers(owner: Owner, count: int) -> AbstractContextManager[None]:
    """Changes and removals, of hot rows and cold ones, until the block ends."""

    def change(connection: psycopg.Connection, draw: random.Random) -> None:
        one = draw.choice((draw.randint(1, 50), draw.randint(1, ROWS)))
        connection.execute("SELECT change(%s)" if draw.random() < 0.95 else "SELECT remove(%s)", [one])

    return writing(owner.url, count, change)


def older_after_newer(owner: Owner, topic: str) -> list[bytes | None]:
    """Keys whose version goes back within one life of the row, and keys that were backfilled twice."""
    wrong: list[bytes | None] = []
    versions: dict[bytes | None, int] = {}
    found = records(owner.kafka, topic)
    for record in found:
        if record.value is None:
            versions.pop(record.key, None)
            continue
        version = orjson.loads(record.value)["version"]
        if version < versions.get(record.key, 0):
            wrong.append(record.key)
        versions[record.key] = version
    backfilled = Counter(record.key for record in found if entry_id(record) == 0)
    return wrong + [key for key, times in backfilled.items() if times > 1]


def test_a_new_version_of_a_topic_is_filled_and_switched_to_under_load(owner: Owner) -> None:
    """With the relay killed: no change is missing in either topic, before and after; each consumer ends right."""
    with RelayProcess(owner.env, owner.directory / "relay.log") as relay:
        must(owner.env, "backfill", "start", "customer", "--watch")
        with writers(owner, 4):
            number = fill(owner, "--source", SHAPE)["request"]
            for killed in range(4):
                eventually(partial(_has, owner, killed * 1_000), seconds=120)
                relay.kill()
                relay.start()
            must(owner.env, "backfill", "watch", str(number))
            switched = switch(owner)
            assert switched == {"type": "customer", "topic": version_2(owner), "reads_source": True, "kept": True}
            before = len(records(owner.kafka, version_2(owner)))
            eventually(partial(_has, owner, before + 200), seconds=120)
        assert relay.stop() == 0
    must(owner.env, "relay", "--until-caught-up")
    assert live(owner.kafka, owner.topic).json == owner.table()
    assert live(owner.kafka, version_2(owner)).json == shaped(owner)
    assert older_after_newer(owner, owner.topic) == older_after_newer(owner, version_2(owner)) == []
    for name in ("customer", owner.topic):
        # The old topic is an entity type of its own now, named as it.
        assert orjson.loads(must(owner.env, "reconcile", name, "--json"))["equal"] == len(owner.table()), name


def _has(owner: Owner, count: int) -> bool:
    return len(records(owner.kafka, version_2(owner))) > count


def test_without_a_source_of_its_own_a_follower_gets_what_was_written(owner: Owner) -> None:
    """The same bytes under the same ids, tombstones too; and it may be kept in step or retired."""
    with owner.relay():
        number = fill(owner)["request"]
        must(owner.env, "backfill", "watch", str(number))
        owner.sql("SELECT change(7)", "SELECT remove(8)")
        eventually(lambda: "8" not in live(owner.kafka, version_2(owner)).values)
        assert fill(owner, "--key", "9")["request"] == number + 1
        must(owner.env, "topics", "retire", version_2(owner), "--yes")
        owner.sql("SELECT change(9)")
        eventually(lambda: "9" in live(owner.kafka, owner.topic).values)
    written = {record.key: record for record in records(owner.kafka, owner.topic)}
    carried = {r.key: r for r in records(owner.kafka, version_2(owner)) if entry_id(r)}
    assert carried.keys() == {b"7", b"8"}
    for key, record in carried.items():
        assert (record.value, record.headers) == (written[key or b""].value, written[key or b""].headers)
    assert live(owner.kafka, version_2(owner)).json["9"]["version"] == 1
    assert len(live(owner.kafka, version_2(owner)).values) == ROWS - 1


def test_nobody_writes_entries_of_a_follower(owner: Owner) -> None:
    """What is published of it is made of the followed type's."""
    fill(owner)
    with psycopg.connect(owner.url) as connection:
        with pytest.raises(outbox_package.UnknownTypeError):
            outbox_package.put(connection, version_2(owner), 1, {})
        with pytest.raises(psycopg.Error, match="unknown entity type"):
            connection.execute("SELECT outbox.put(%s, '1', '{}')", [version_2(owner)])


def test_what_was_not_filled_is_not_switched_to(owner: Owner) -> None:
    """A topic that has the changes alone lacks what was there before; a second that follows is no new one."""
    nothing = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
    assert (nothing.returncode, "Nothing carries the changes" in nothing.stderr) == (78, True)
    number = fill(owner, "--source", SHAPE, "--where", "id < 10")["request"]
    running = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
    assert (running.returncode, f"Request {number} (backfill, running)" in running.stderr) == (78, True)
    with owner.relay():
        must(owner.env, "backfill", "watch", str(number))
        partly = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
        assert (partly.returncode, "has not been filled" in partly.stderr) == (78, True)
        other = outbox(
            owner.env, "backfill", "start", "customer", "--to-topic", version_2(owner), "--source", "SELECT 1"
        )
        assert (other.returncode, "with another source" in other.stderr) == (78, True)
        of_follower = outbox(owner.env, "backfill", "start", version_2(owner), "--to-topic", "third")
        assert (of_follower.returncode, 'follows "customer" itself' in of_follower.stderr) == (78, True)
        kept = outbox(owner.env, "types", "remove", "customer", "--yes")
        assert (kept.returncode, f"topics retire {version_2(owner)}" in kept.stderr) == (78, True)
        again = fill(owner)["request"]
        must(owner.env, "backfill", "watch", str(again))
        assert switch(owner, "--no-keep")["kept"] is False
        owner.sql("SELECT change(5)")
        eventually(lambda: live(owner.kafka, version_2(owner)).json["5"] == shaped(owner)["5"])
    assert "5" not in live(owner.kafka, owner.topic).values
    types = orjson.loads(must(owner.env, "types", "list", "--json"))
    assert [(of["name"], of["topic"], of["follows"]) for of in types] == [("customer", version_2(owner), None)]


def test_a_backfill_says_nothing_of_a_follower_that_came_later_or_has_another_source(owner: Owner) -> None:
    """Retired and begun again, or with another source: it is to be filled anew."""
    with owner.relay():
        must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE)["request"]))
        must(owner.env, "types", "change", version_2(owner), "--source", SHAPE + " WHERE id > 0")
        other = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
        assert (other.returncode, "as another source said it" in other.stderr) == (78, True)
        must(owner.env, "topics", "retire", version_2(owner), "--yes")
        must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE, "--key", "1")["request"]))
        anew = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
        assert (anew.returncode, "has not been filled" in anew.stderr) == (78, True)
        must(owner.env, "backfill", "watch", str(fill(owner)["request"]))
        switch(owner)
        # Kept in step, the old one has everything: back without another backfill.
        back = ("topics", "switch", "customer", "--to-topic", owner.topic, "--yes", "--json")
        assert orjson.loads(must(owner.env, *back))["topic"] == owner.topic
        owner.sql("SELECT change(7)")
        eventually(lambda: live(owner.kafka, owner.topic).json.get("7") == owner.table()["7"])
        eventually(lambda: live(owner.kafka, version_2(owner)).json["7"] == shaped(owner)["7"])


def test_an_old_topic_without_a_source_is_kept_as_it_was_written(owner: Owner) -> None:
    """It has no source to repair it by, least of all that of the new shape."""
    with psycopg.connect(owner.url) as connection:
        connection.execute("UPDATE outbox.entity_types SET source = NULL")
    with owner.relay():
        must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE)["request"]))
        switch(owner)
        owner.sql("SELECT change(7)")
        eventually(lambda: live(owner.kafka, owner.topic).json.get("7") == owner.table()["7"])
        eventually(lambda: live(owner.kafka, version_2(owner)).json["7"] == shaped(owner)["7"])
    types = {of["name"]: of for of in orjson.loads(must(owner.env, "types", "list", "--json"))}
    assert (types[owner.topic]["source"], types[owner.topic]["reads_source"]) == (None, False)


def test_a_type_of_which_every_entry_counts_reads_no_source(owner: Owner) -> None:
    """A source knows the present state alone; and a history is not switched away from."""
    must(owner.env, "types", "change", "customer", "--no-collapse")
    refused = outbox(owner.env, "backfill", "start", "customer", "--to-topic", version_2(owner), "--source", SHAPE)
    assert (refused.returncode, "every entry is published" in refused.stderr) == (78, True)
    refused = outbox(owner.env, "types", "change", "customer", "--reads-source")
    assert (refused.returncode, "every entry is published" in refused.stderr) == (78, True)
    owner.sql("SELECT change(n) FROM generate_series(1, 100) n")
    with owner.relay():
        arguments = ("replay", "--type", "customer", "--history", "--to-topic", version_2(owner), "--json")
        assert orjson.loads(must(owner.env, *arguments))["rows"] == 100
        of_follower = outbox(owner.env, "replay", "--type", version_2(owner), "--since", "2020-01-01")
        assert (of_follower.returncode, "has no entries of its own" in of_follower.stderr) == (78, True)
        assert switch(owner)["reads_source"] is False
    assert len(records(owner.kafka, version_2(owner))) == 100


def test_a_state_that_fails_for_the_new_topic_is_its_dead_letter_alone(owner: Owner) -> None:
    """The old one gets it; the switch waits until it is mended."""
    failing = SHAPE.replace("version)", "100 / (id - 7))")
    with owner.relay() as relay:
        must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE)["request"]))
        must(owner.env, "types", "change", version_2(owner), "--source", failing)
        owner.sql("SELECT change(7)", "SELECT change(8)")
        letter = relay.wait_event("relay.dead_letter")
        assert (letter["type"], letter["key"], letter["reason"]) == (version_2(owner), "7", "source")
        eventually(lambda: {"7", "8"} <= set(live(owner.kafka, owner.topic).values))
        eventually(lambda: live(owner.kafka, version_2(owner)).json["8"]["version"] == 100)
        refused = outbox(owner.env, "topics", "switch", "customer", "--to-topic", version_2(owner), "--yes")
        assert (refused.returncode, "1 entities are not in a topic" in refused.stderr) == (78, True)
        must(owner.env, "types", "change", version_2(owner), "--source", SHAPE)
        retried = must(owner.env, "dead-letters", "retry", "--type", version_2(owner), "--json")
        assert orjson.loads(retried)["retried"] == 1
        switch(owner)
    assert live(owner.kafka, version_2(owner)).json["7"] == shaped(owner)["7"]


def test_a_source_that_is_broken_holds_everything_up_and_says_how_to_go_on(owner: Owner) -> None:
    """Nothing may be missing in a topic that is kept in step; ended, it holds nothing up."""
    with owner.relay(backoff_max=0.1) as relay:
        must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE)["request"]))
        owner.sql("ALTER TABLE customer RENAME COLUMN name TO title", "SELECT change(7)")
        stuck = relay.wait_event("relay.stuck")
        assert f'"{version_2(owner)}" cannot be read' in stuck["error"]
        assert f"outbox topics retire {version_2(owner)}" in stuck["cure"]

        def shown() -> bool:
            (shard,) = orjson.loads(must(owner.env, "status", "--json"))["shards"]
            return (shard["state"], shard["on"]) == ("stuck", "database")

        eventually(shown, what="stuck")
        assert "7" not in live(owner.kafka, owner.topic).values
        must(owner.env, "topics", "retire", version_2(owner), "--yes")
        eventually(lambda: "7" in live(owner.kafka, owner.topic).values)


def test_with_two_shards_a_key_has_one_relay_in_both_topics(
    make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path
) -> None:
    """That of its entries: each row comes from one of them, once."""
    url = make_outbox(shards=2)
    owner = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    _tables(owner)
    owner.add_type()
    with (
        RelayProcess({**owner.env, "OUTBOX_SHARD": "0"}, tmp_path / "relay-0.log") as one,
        RelayProcess({**owner.env, "OUTBOX_SHARD": "1"}, tmp_path / "relay-1.log") as other,
    ):
        with writers(owner, 2):
            must(owner.env, "backfill", "watch", str(fill(owner, "--source", SHAPE)["request"]))
        assert one.stop() == other.stop() == 0
    for shard in ("0", "1"):
        must({**owner.env, "OUTBOX_SHARD": shard}, "relay", "--until-caught-up")
    assert live(kafka, version_2(owner)).json == shaped(owner)
    assert older_after_newer(owner, version_2(owner)) == []


def test_states_of_a_source_that_do_not_fit_cut_the_batch(owner: Owner) -> None:
    """Memory is bounded by what is configured, not by what a source makes of a key; nothing is left out."""
    large = "SELECT id::text AS key, jsonb_build_object('x', repeat('y', 10000)) AS state, id FROM customer"
    with psycopg.connect(owner.url, autocommit=True) as connection:
        types = read_types(connection, "outbox")
        follower.follow(connection, "outbox", types[0], "large", source=large)
    owner.sql(
        "SELECT outbox.put('customer', (n % 2500 + 1)::text, '{}') FROM generate_series(1, 5000) n",
    )
    rows: list[Row] = []
    ids: list[int] = []
    with closing(Reader(Config(database_url=owner.url, batch_bytes=1_000_000), shard=0)) as reader:
        identity = reader.open()
        position = start(identity.name, 0, "t", 1, identity.system, 1, 0)
        while True:
            batch = reader.read(position)
            named = {entry[2]: entry[0] for entry in batch.entries}
            assert {row.entry.key: row.entry.id for row in batch.live} == named
            assert sum(len(row.entry.state or b"") for row in batch.live) <= 1_000_000 + 1_000 * 10_100
            rows += batch.live
            ids += [entry[0] for entry in batch.entries]
            if not batch.cut:
                break
            position = batch.next()
    assert ids == sorted(set(ids))
    assert len(ids) == 5000
    assert {row.entry.key for row in rows} == {str(n) for n in range(1, 2501)}


def test_a_batch_that_ends_early_is_looked_up_in_its_own_snapshot(owner: Owner, postgres: Postgres) -> None:
    """Small states become large in a backlog: the query is given up, and what reads the source goes on after it.

    So it is for a relay that starts within a cut, and knows of no size yet. There is more than the buffers between the
    server and the client hold: otherwise it may have sent all of it before it is told to stop.
    """
    with psycopg.connect(owner.url, autocommit=True) as connection:
        follower.follow(connection, "outbox", read_types(connection, "outbox")[0], "second", source=SHAPE)
    owner.sql(
        "SELECT outbox.put('customer', n::text, jsonb_build_object('x', repeat('y', size)))"
        " FROM generate_series(1, 900) n, LATERAL (SELECT CASE WHEN n <= 300 THEN 9 ELSE 60000 END AS size) s",
    )
    logged = postgres.log.stat().st_size
    config = Config(database_url=owner.url, batch_bytes=2_000_000)
    ids: list[int] = []
    with closing(Reader(config, shard=0)) as reader:
        identity = reader.open()
        position = start(identity.name, 0, "t", 1, identity.system, 1, 0)
        while True:
            batch = reader.read(position)
            assert {row.entry.id for row in batch.live} == {entry[0] for entry in batch.entries}
            ids += [entry[0] for entry in batch.entries]
            if not batch.cut:
                break
            position = batch.next()
            if len(ids) < 600:
                with closing(Reader(config, shard=0)) as another:
                    another.open()
                    assert another.read(position).live
    assert ids == sorted(set(ids))
    assert len(ids) == 900
    with postgres.log.open("rb") as log:
        log.seek(logged)
        assert b"canceling statement due to user request" in log.read()
