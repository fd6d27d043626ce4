"""The relay on real servers: exactly once, in order, whatever comes."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import orjson
import psycopg
import pytest
from confluent_kafka import Producer

from consume import entry_id, live, records, seen
from devstack.kafka import Kafka
from outbox.config import Config
from outbox.entity_type import EntityType
from outbox.kafka.admin import Admin
from outbox.lineage import Head
from outbox.position import Position
from outbox.reader import Reader
from outbox.relay import Relay
from outbox.wake import Wake
from relays import RelayProcess, environment, eventually, must, outbox
from workload import Writers, committed_ids, judge

pytestmark = [pytest.mark.postgres, pytest.mark.kafka, pytest.mark.acceptance]


@dataclass
class Road:
    """An outbox and its topics: everything but the relay."""

    url: str
    name: str
    env: dict[str, str]
    kafka: Kafka
    directory: Path

    @property
    def topic(self) -> str:
        """The topic of the entity type `thing`."""
        return f"{self.name}.thing"

    def add_type(self, name: str, *options: str) -> str:
        """Register an entity type and make its topic; the topic's name."""
        topic = f"{self.name}.{name}"
        must(self.env, "types", "add", name, "--topic", topic, *options)
        must(self.env, "topics", "apply", "--yes")
        return topic

    def relay(self, *arguments: str, **settings: object) -> RelayProcess:
        """Start a relay."""
        more = {f"OUTBOX_{key.upper()}": str(value) for key, value in settings.items()}
        log = self.directory / f"relay-{random.randrange(10**9)}.log"
        return RelayProcess({**self.env, **more}, log, arguments)

    def drain(self, **settings: object) -> None:
        """Publish all that is committed."""
        more = {f"OUTBOX_{key.upper()}": str(value) for key, value in settings.items()}
        must({**self.env, **more}, "relay", "--until-caught-up", seconds=120)

    def sql(self, *statements: str) -> None:
        """Run statements in one transaction."""
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement.encode())


@pytest.fixture
def road(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path) -> Road:
    """An outbox with its own topics, without entity types."""
    url = make_outbox()
    env = environment(url, kafka.bootstrap)
    return Road(url, outbox_name, env, kafka, tmp_path)


def test_a_change_becomes_a_record_with_key_value_time_and_one_header(road: Road) -> None:
    """The contract: key in UTF-8, the state's bytes, created-at, `outbox-id`."""
    topic = road.add_type("user")
    road.sql("""SELECT outbox.put('user', 'Zoë', '{"name": "Zoë"}')""")
    road.drain()
    (record,) = records(road.kafka, topic)
    assert record.key == "Zoë".encode()
    assert record.value is not None
    assert orjson.loads(record.value) == {"name": "Zoë"}
    assert [name for name, _ in record.headers] == ["outbox-id"]
    with psycopg.connect(road.url) as connection:
        row = connection.execute(
            "SELECT id, floor(extract(epoch FROM created_at) * 1000)::bigint FROM outbox.entries"
        ).fetchone()
    assert row == (entry_id(record), record.timestamp_ms)


def test_draining_twice_publishes_once(road: Road) -> None:
    """The position in Kafka is the truth; nothing in the database says what was published."""
    topic = road.add_type("user")
    road.sql("SELECT outbox.put('user', n::text, '{}') FROM generate_series(1, 100) n")
    road.drain()
    road.drain()
    assert len(records(road.kafka, topic)) == 100


def test_a_batch_tells_how_old_it_was_and_where_its_time_went(road: Road) -> None:
    """An operator sees which of the servers it waits for; the steps are a part of the age, the rest is waiting."""
    road.add_type("user")
    with road.relay(log_level="debug") as relay:
        relay.wait_event("relay.holds")
        road.sql("SELECT outbox.put('user', n::text, '{}') FROM generate_series(1, 100) n")
        published = relay.wait_event("relay.published")
    steps = [published[f"{step}_seconds"] for step in ("read", "prepare", "produce", "flush", "commit")]
    assert all(seconds > 0 for seconds in steps)
    # Ages are whole milliseconds, by another clock than the steps.
    assert sum(steps) <= published["age_seconds"] + 0.005


def test_a_type_that_is_added_while_a_shard_is_taken_has_its_topic(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """The topics were looked at before: it is looked at them again, and nothing is dead-lettered."""
    road.add_type("user")
    topic = road.add_type("late")
    must(road.env, "types", "remove", "late", "--yes")
    look = Reader.look
    looks: list[int] = []

    def add(reader: Reader, position: Position) -> tuple[Head, Mapping[str, EntityType]]:
        found = look(reader, position)
        looks.append(found[0].types_version)
        if len(looks) == 1:
            road.sql(
                f"INSERT INTO outbox.entity_types (name, topic) VALUES ('late', '{topic}')",
                "SELECT outbox.put('late', '1', '{}')",
            )
        return found

    monkeypatch.setattr(Reader, "look", add)
    config = Config(database_url=road.url, kafka_bootstrap_servers=road.kafka.bootstrap, replication_factor=1)
    with closing(Wake()) as wake:
        done = Relay(config, wake=wake).run(until_caught_up=True)
    assert looks[0] < looks[-1]
    assert done.caught_up
    assert len(records(road.kafka, topic)) == 1


def test_tombstones_end_what_was_deleted(road: Road) -> None:
    """Delete, delete then re-create, create then delete between two batches."""
    topic = road.add_type("user")
    road.sql("SELECT outbox.put('user', k, '1') FROM unnest(ARRAY['gone', 'back', 'stays']) k")
    road.drain()
    road.sql(
        "SELECT outbox.delete('user', 'gone')",
        "SELECT outbox.delete('user', 'back')",
        "SELECT outbox.put('user', 'back', '2')",
        "SELECT outbox.put('user', 'never', '1')",
        "SELECT outbox.delete('user', 'never')",
    )
    road.drain()
    assert live(road.kafka, topic).json == {"back": 2, "stays": 1}
    never = [record for record in records(road.kafka, topic) if record.key == b"never"]
    assert [record.value for record in never] == [None]


def test_a_hot_key_leads_to_few_records_and_with_collapse_off_to_each(road: Road) -> None:
    """10,000 changes of one key."""
    hot = road.add_type("hot")
    every = road.add_type("every", "--no-collapse", "--partitions", "1")
    road.sql(
        "SELECT outbox.put('hot', 'one', to_jsonb(n)) FROM generate_series(1, 10000) n",
        "SELECT outbox.put('every', 'one', to_jsonb(n)) FROM generate_series(1, 10000) n",
    )
    road.drain(batch_rows=2000)
    assert len(records(road.kafka, hot)) <= 10
    assert live(road.kafka, hot).json == {"one": 10000}
    values = [orjson.loads(record.value or b"0") for record in records(road.kafka, every)]
    assert values == list(range(1, 10001))


def test_one_oversized_and_one_refused_entry_among_ten_thousand(road: Road) -> None:
    """The others arrive; the two are dead-lettered, and published when the limits are raised and a retry is asked."""
    topic = road.add_type("thing", "--max-bytes", "20000", "--topic-setting", "message.timestamp.before.max.ms=3600000")
    road.sql(
        """INSERT INTO outbox.entries (type, key, state, created_at)
           SELECT 'thing', n::text, CASE n WHEN 3333 THEN repeat('x', 1200000)::bytea ELSE '{"n": 1}'::bytea END,
                  CASE n WHEN 6666 THEN now() - interval '2 hours' ELSE now() END
           FROM generate_series(1, 10000) n"""
    )
    road.drain()
    keys = {(record.key or b"").decode() for record in records(road.kafka, topic)}
    assert len(records(road.kafka, topic)) == 9998
    assert keys == {str(n) for n in range(1, 10001)} - {"3333", "6666"}
    letters = orjson.loads(must(road.env, "dead-letters", "list", "--json"))
    assert {(letter["key"], letter["reason"]) for letter in letters} == {("3333", "too-large"), ("6666", "refused")}

    must(road.env, "types", "change", "thing", "--max-bytes", "2000000")
    must(road.env, "types", "change", "thing", "--topic-setting", "message.timestamp.before.max.ms=9223372036854775807")
    must(road.env, "topics", "apply", "--yes")
    with road.relay() as relay:
        relay.wait_event("relay.holds")
        must(road.env, "dead-letters", "retry", "--all", "--yes")
        eventually(lambda: len(records(road.kafka, topic)) == 10000)
        eventually(lambda: orjson.loads(must(road.env, "dead-letters", "list", "--json")) == [])
        relay.stop()
    assert set(Counter(record.key for record in records(road.kafka, topic)).values()) == {1}


def test_a_later_state_supersedes_a_dead_letter(road: Road) -> None:
    """What is published afterwards is newer: the letter has nothing to say any more."""
    topic = road.add_type("thing", "--max-bytes", "20000")
    road.sql("INSERT INTO outbox.entries (type, key, state) VALUES ('thing', '1', repeat('x', 1200000)::bytea)")
    road.drain()
    assert len(orjson.loads(must(road.env, "dead-letters", "list", "--json"))) == 1
    road.sql("SELECT outbox.put('thing', '1', '{}')")
    road.drain()
    assert orjson.loads(must(road.env, "dead-letters", "list", "--json")) == []
    assert live(road.kafka, topic).json == {"1": {}}


def test_kill_9_at_random_moments_while_writers_write(road: Road) -> None:
    """A `read_committed` consumer sees each published version once, in order, and ends at the table's state."""
    topic = road.add_type("thing", "--no-collapse")
    road.sql("CREATE TABLE thing (key text PRIMARY KEY, version bigint DEFAULT 0, alive boolean DEFAULT true)")
    road.sql("INSERT INTO thing (key) SELECT 'k' || n FROM generate_series(1, 20) n")
    chance = random.Random(7)
    kills = 0
    with (
        Writers(road.url, keys=20, count=6, transactions=200, deletes=True) as writers,
        road.relay(batch_rows=50) as relay,
    ):
        while writers.running or kills < 8:
            relay.wait_event("relay.holds", count=kills + 1)
            before = len(committed_ids(road.url))
            target = before + chance.randint(0, 150)
            eventually(lambda target=target: not writers.running or len(committed_ids(road.url)) >= target)  # type: ignore[misc]  # bound now
            relay.kill()
            kills += 1
            relay.start()
        writers.join()
        relay.wait_event("relay.holds", count=kills + 1)
        assert relay.stop() == 0
    road.drain()
    assert kills >= 8
    judgement = judge(committed_ids(road.url), seen(road.kafka, topic))
    assert judgement.right, judgement
    with psycopg.connect(road.url) as connection:
        table: dict[str, int] = dict(
            connection.execute("SELECT key, version FROM thing WHERE alive AND version > 0").fetchall()
        )
    assert {key: value["version"] for key, value in live(road.kafka, topic).json.items()} == table


def test_a_second_relay_ends_the_first_with_a_message(road: Road) -> None:
    """The first is fenced; it says so, exits 75, and nothing is doubled."""
    topic = road.add_type("user")
    with road.relay() as first:
        first.wait_event("relay.holds")
        road.sql("SELECT outbox.put('user', '1', '{}')")
        eventually(lambda: len(records(road.kafka, topic)) == 1)
        with road.relay() as second:
            second.wait_event("relay.holds")
            road.sql("SELECT outbox.put('user', '2', '{}')")
            assert first.process.wait(30) == 75
            assert "took over" in first.log.read_text()
            eventually(lambda: len(records(road.kafka, topic)) == 2)
            assert second.stop() == 0


def test_a_stall_beyond_the_transactions_time_limit_goes_on_by_itself(road: Road) -> None:
    """Kafka says `fenced` for it too; the position shows that nobody else came."""
    topic = road.add_type("user")
    with road.relay(transaction_timeout=2, batch_rows=500) as relay:
        relay.wait_event("relay.holds")
        road.sql("SELECT outbox.put('user', n::text, '{}') FROM generate_series(1, 20000) n")
        relay.process.send_signal(signal.SIGSTOP)
        # Frozen, perhaps within a transaction: the coordinator ends that after its time limit.
        with psycopg.connect(road.url) as clock:
            clock.execute("SELECT pg_sleep(6)")
        relay.process.send_signal(signal.SIGCONT)
        road.sql("SELECT outbox.put('user', 'last', '{}')")
        eventually(lambda: "last" in live(road.kafka, topic).values, seconds=60)
        assert relay.stop() == 0
    road.drain()
    assert len(records(road.kafka, topic)) == 20001


def test_a_position_that_kafka_has_not_marked_is_said_and_publishing_goes_on(road: Road) -> None:
    """Not by a broker that broke a transaction, which cannot be had at will, but by somebody who left his open."""
    topic = road.add_type("user")
    road.sql("SELECT outbox.put('user', '1', '{}')")
    road.drain()
    stranger = Producer({"bootstrap.servers": road.kafka.bootstrap, "transactional.id": "a-stranger"})
    stranger.init_transactions(30)
    stranger.begin_transaction()
    stranger.produce(f"{road.name}.outbox.positions", b"{}", b"stranger", 0)
    assert stranger.flush(30) == 0
    road.sql("SELECT outbox.put('user', '2', '{}')")
    with road.relay() as relay:
        assert relay.wait_event("relay.torn")["unmarked"] == 1
        eventually(lambda: len(records(road.kafka, topic)) == 2)
        stranger.abort_transaction(30)
        assert relay.stop() == 0
    with road.relay() as relay:
        relay.wait_event("relay.holds")
        assert not [event for event in relay.events if event.get("event") == "relay.torn"]
        assert relay.stop() == 0
    road.drain()
    assert len(records(road.kafka, topic)) == 2


def test_sigterm_ends_it_in_order_and_within_seconds(road: Road) -> None:
    """Also while it is busy: the batch is finished or aborted."""
    topic = road.add_type("user")
    road.sql("SELECT outbox.put('user', n::text, '{}') FROM generate_series(1, 30000) n")
    with road.relay(batch_rows=500) as relay:
        relay.wait_event("relay.holds")
        assert relay.stop(seconds=10) == 0
    road.drain()
    assert len(records(road.kafka, topic)) == 30000


def test_the_doorbell_wakes_a_sleeping_relay(road: Road) -> None:
    """With a polling floor of an hour only the bell can have done it."""
    topic = road.add_type("user")
    with road.relay(poll_interval=3600) as relay:
        relay.wait_event("relay.holds")
        for number in range(1, 21):
            road.sql(f"SELECT outbox.put('user', '{number}', '{{}}')")
            eventually(lambda number=number: len(records(road.kafka, topic)) == number)  # type: ignore[misc]  # bound now
        assert relay.stop() == 0


def test_a_missing_topic_and_one_that_is_not_compacted_are_refused_with_the_command(road: Road) -> None:
    """A topic that deletes would lose every entity that does not change for a week."""
    must(road.env, "types", "add", "user", "--topic", f"{road.name}.user")
    missing = outbox(road.env, "relay", "--until-caught-up")
    assert missing.returncode == 78
    assert "outbox topics apply" in missing.stderr
    must(road.env, "topics", "apply", "--yes")
    with Admin(road.kafka.bootstrap, {}) as admin:
        admin.change(f"{road.name}.user", {"cleanup.policy": "delete"})
    deleting = outbox(road.env, "relay", "--until-caught-up")
    assert deleting.returncode == 78
    assert "cleanup.policy" in deleting.stderr


def test_a_lost_tail_is_adopted_by_itself_and_published_again_under_new_ids(road: Road) -> None:
    """The anchor's row is gone: every retained entry is new, in a new epoch; said, and no older state stays last."""
    topic = road.add_type("thing")
    states = "SELECT outbox.put('thing', n::text, to_jsonb(n)) FROM generate_series(1, 50) n"
    road.sql(states)
    road.drain()
    greatest = max(entry_id(record) for record in records(road.kafka, topic))
    # The same as a fail-over to a standby that misses the tail: the last entries are not there.
    road.sql("DELETE FROM outbox.entries WHERE id > 40", "SELECT setval('outbox.entries_id_seq', 40)")
    road.sql("SELECT outbox.put('thing', '7', '700')")
    with road.relay() as relay:
        relay.wait_event("relay.adopted")
        eventually(lambda: live(road.kafka, topic).json.get("7") == 700)
        relay.stop()
    # All of one transaction, but its end is marked partition by partition.
    eventually(lambda: len([r for r in records(road.kafka, topic) if entry_id(r) > greatest]) == 40)
    with psycopg.connect(road.url) as connection:
        assert connection.execute("SELECT epoch FROM outbox.settings").fetchone() == (2,)
    road.drain()
    assert len(records(road.kafka, topic)) == 90


def test_with_on_lost_tail_stop_a_person_decides(road: Road) -> None:
    """The relay stops with exit code 76 and names `outbox adopt`."""
    road.add_type("thing")
    road.sql("SELECT outbox.put('thing', n::text, to_jsonb(n)) FROM generate_series(1, 5) n")
    road.drain()
    road.sql("DELETE FROM outbox.entries WHERE id = 5")
    stopped = outbox({**road.env, "OUTBOX_ON_LOST_TAIL": "stop"}, "relay", "--until-caught-up")
    assert stopped.returncode == 76
    assert "outbox adopt" in stopped.stderr


def test_deleted_keys_are_gone_after_compaction_has_really_run(road: Road) -> None:
    """Compaction leaves every live key's last state and, in the end, no trace of a deleted one."""
    topic = road.add_type(
        "thing", "--partitions", "1",
        *(part for setting in ("segment.ms=200", "min.cleanable.dirty.ratio=0.001", "min.compaction.lag.ms=0",
                               "delete.retention.ms=0", "max.compaction.lag.ms=500")
          for part in ("--topic-setting", setting)),
    )  # fmt: skip
    for _ in range(3):
        road.sql("SELECT outbox.put('thing', n::text, to_jsonb(n)) FROM generate_series(1, 100) n")
        road.drain()
    road.sql("SELECT outbox.delete('thing', n::text) FROM generate_series(1, 50) n")
    road.drain()
    expected = {str(n).encode() for n in range(51, 101)}

    def compacted() -> bool:
        # A later record rolls the segment: the active one is never compacted.
        road.sql("SELECT outbox.put('thing', '100', '100')")
        road.drain()
        return {record.key for record in records(road.kafka, topic)} == expected

    eventually(compacted, seconds=120, what="compaction")
    assert live(road.kafka, topic).json == {str(n): n for n in range(51, 101)}


def test_two_types_of_one_batch_go_to_their_own_topics(road: Road) -> None:
    """The topic says the type."""
    first, second = road.add_type("a"), road.add_type("b")
    make = "SELECT outbox.put(t, n::text, to_jsonb(n)) FROM unnest(ARRAY['a', 'b']) t, generate_series(1, 10) n"
    road.sql(make)
    road.drain()
    assert len(records(road.kafka, first)) == len(records(road.kafka, second)) == 10


@pytest.mark.parametrize("held", [1_000_000, 1500])
def test_refused_records_are_found_in_a_few_transactions_and_no_producer_is_left_behind(
    road: Road, tmp_path: Path, held: int
) -> None:
    """Several in one batch, one alone in another topic's: exactly the guilty are dead-lettered.

    With a client that holds few records the broker refuses one while the others are still being handed over.
    """
    topic = road.add_type("thing", "--topic-setting", "message.timestamp.before.max.ms=3600000")
    other = road.add_type("other", "--partitions", "1", "--topic-setting", "message.timestamp.before.max.ms=3600000")
    road.sql(
        """INSERT INTO outbox.entries (type, key, state, created_at)
           SELECT 'thing', n::text, '{}', now() - CASE WHEN n % 100 = 0 THEN interval '2 hours' ELSE '0' END
           FROM generate_series(1, 3000) n""",
        """INSERT INTO outbox.entries (type, key, state, created_at)
           SELECT 'other', n::text, '{}', now() - CASE n WHEN 77 THEN interval '2 hours' ELSE '0' END
           FROM generate_series(1, 500) n""",
    )
    config = tmp_path / "outbox.toml"
    config.write_text(f'[kafka]\n"queue.buffering.max.messages" = {held}\n')
    with road.relay(log_level="debug", config=config) as relay:
        relay.wait_event("relay.published")
        assert not [event for event in relay.events if event.get("event") in {"relay.waiting", "relay.aborted"}]
        threads = len(list(Path(f"/proc/{relay.process.pid}/task").iterdir()))
        assert relay.stop() == 0
    assert {r.key for r in records(road.kafka, topic)} == {b"%d" % n for n in range(1, 3001) if n % 100}
    assert {r.key for r in records(road.kafka, other)} == {b"%d" % n for n in range(1, 501) if n != 77}
    letters = orjson.loads(must(road.env, "dead-letters", "list", "--json"))
    assert {(x["type"], x["key"]) for x in letters} == {("other", "77")} | {
        ("thing", str(n)) for n in range(100, 3001, 100)
    }
    # A producer has five threads and more: thirty refusals must not leave thirty of them.
    assert threads < 30


def test_entries_that_no_writer_would_write_are_dead_lettered_or_cleaned_and_the_others_go_on(road: Road) -> None:
    """A hand-written INSERT: headers that cannot be read, names that are the relay's own, an unknown type."""
    topic = road.add_type("thing")
    road.sql(
        """INSERT INTO outbox.entries (type, key, state, headers) VALUES
           ('thing', 'huge', '{}', '{"a": 1e400}'), ('thing', 'forged', '{}', '{"outbox-id": "5", "b": "2"}'),
           ('thing', 'number', '{}', '{"a": 1.5, "n": null}'), ('nobody', 'x', '{}', NULL)""",
        "INSERT INTO outbox.entries (type, key, state, created_at) VALUES ('thing', 'old', '{}', '0044-03-15 BC')",
        "INSERT INTO outbox.entries (type, key, state, created_at) VALUES ('thing', 'far', '{}', '9999-01-01')",
        "SELECT outbox.put('thing', 'good', '{}')",
    )
    road.drain()
    found = {(record.key or b"").decode(): record for record in records(road.kafka, topic)}
    assert set(found) == {"forged", "number", "old", "far", "good"}
    assert [name for name, _ in found["forged"].headers] == ["outbox-id", "b"]
    letters = orjson.loads(must(road.env, "dead-letters", "list", "--json"))
    assert {(x["key"], x["reason"]) for x in letters} == {("huge", "headers"), ("x", "unknown-type")}
    for bad in ("created_at) VALUES ('thing', '1', 'infinity'", f"state) VALUES ('{'t' * 201}', '1', '{{}}'"):
        with pytest.raises(psycopg.errors.CheckViolation):
            road.sql(f"INSERT INTO outbox.entries (type, key, {bad})")


def test_a_state_that_is_larger_than_the_clients_usual_queue_is_published(road: Road) -> None:
    """70 MB, incompressible, among small ones."""
    topic = road.add_type("thing", "--max-bytes", "90000000", "--partitions", "1")
    with psycopg.connect(road.url) as connection:
        connection.execute("SELECT outbox.put('thing', 'before', '{}')")
        connection.execute(
            "SELECT outbox.put_bytes('thing', 'big', %s, 'application/octet-stream')", [random.randbytes(70_000_000)]
        )
        connection.execute("SELECT outbox.put('thing', 'after', '{}')")
    road.drain()
    sizes = {(r.key or b"").decode(): len(r.value or b"") for r in records(road.kafka, topic)}
    assert sizes == {"before": 2, "big": 70_000_000, "after": 2}


def test_a_type_may_be_added_before_its_topic_while_the_relay_runs(road: Road) -> None:
    """The others go on; its own entries wait, which is said; made, they go on by themselves."""
    topic = road.add_type("a")
    with road.relay(backoff_max="0.5") as relay:
        relay.wait_event("relay.holds")
        must(road.env, "types", "add", "b", "--topic", f"{road.name}.b")
        road.sql("SELECT outbox.put('a', '1', '{}')")
        assert relay.wait_event("relay.topic")["topic"] == f"{road.name}.b"
        eventually(lambda: len(records(road.kafka, topic)) == 1)
        road.sql("SELECT outbox.put('b', '1', '{}')", "SELECT outbox.put('a', '2', '{}')")
        said = relay.wait_event("relay.stuck")
        assert (said["what"], "outbox topics apply" in said["cure"]) == ("topic", True)

        def stuck() -> bool:
            (shard,) = orjson.loads(must(road.env, "status", "--json"))["shards"]
            return (shard["state"], shard["on"]) == ("stuck", "topic")

        eventually(stuck, what="stuck")
        with psycopg.connect(road.url) as clock:
            clock.execute("SELECT pg_sleep(2)")  # several tries
        must(road.env, "topics", "apply", "--yes")
        relay.wait_event("relay.resumed")
        said_events = Counter(event.get("event") for event in relay.events)
        assert (said_events["relay.stuck"], said_events["relay.holds"], said_events["relay.resumed"]) == (1, 1, 1)
        eventually(lambda: len(records(road.kafka, topic)) == 2 and len(records(road.kafka, f"{road.name}.b")) == 1)
        assert relay.stop() == 0


def test_a_limit_that_was_raised_is_seen_before_anything_is_called_too_large(road: Road) -> None:
    """The order of the documentation: change the type, then apply the topics."""
    topic = road.add_type("thing", "--max-bytes", "20000")
    with road.relay() as relay:
        relay.wait_event("relay.holds")
        must(road.env, "types", "change", "thing", "--max-bytes", "3000000")
        road.sql("SELECT outbox.put('thing', 'small', '{}')")
        eventually(lambda: len(records(road.kafka, topic)) == 1)
        must(road.env, "topics", "apply", "--yes")
        with psycopg.connect(road.url) as clock:
            clock.execute("SELECT pg_sleep(3.2)")  # looks are made no more often
        road.sql("""SELECT outbox.put('thing', 'big', to_jsonb(repeat('x', 1600000)))""")
        eventually(lambda: len(records(road.kafka, topic)) == 2)
        assert relay.stop() == 0
    assert orjson.loads(must(road.env, "dead-letters", "list", "--json")) == []


def test_sigterm_ends_a_statement_that_waits_for_a_lock(road: Road) -> None:
    """However long the server's own limit is."""
    road.add_type("thing")
    with (
        road.relay(statement_timeout=600, poll_interval=0.1) as relay,
        psycopg.connect(road.url) as holder,
        psycopg.connect(road.url, autocommit=True) as look,
    ):
        relay.wait_event("relay.holds")
        holder.execute("LOCK TABLE outbox.entries IN ACCESS EXCLUSIVE MODE")
        eventually(
            lambda: (
                look.execute(
                    "SELECT FROM pg_stat_activity"
                    " WHERE application_name LIKE 'outbox-relay%' AND wait_event_type = 'Lock'"
                ).fetchone()
                is not None
            ),
            what="the relay waits for the lock",
        )
        assert relay.stop(seconds=10) == 0


def test_a_server_that_answers_no_more_is_given_up_after_a_time(road: Road) -> None:
    """Its kernel acknowledges every packet: only a limit of the client's own ends the wait."""
    topic = road.add_type("thing")
    with (
        road.relay(statement_timeout=1, poll_interval=0.2) as relay,
        psycopg.connect(road.url, autocommit=True) as look,
    ):
        relay.wait_event("relay.holds")
        (backend,) = look.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay%'"
        ).fetchone() or (0,)
        os.kill(backend, signal.SIGSTOP)
        try:
            assert relay.wait_event("relay.waiting")["what"] == "database"
            road.sql("SELECT outbox.put('thing', '1', '{}')")
            relay.wait_event("relay.resumed")
            eventually(lambda: len(records(road.kafka, topic)) == 1)
        finally:
            os.kill(backend, signal.SIGCONT)
        assert relay.stop() == 0


def test_a_drain_that_is_stopped_or_out_of_time_says_that_it_has_not_caught_up(road: Road) -> None:
    """Exit 69: whoever deploys must not believe that all is published."""
    road.add_type("thing")
    road.sql("SELECT outbox.put('thing', n::text, '{}') FROM generate_series(1, 20000) n")
    with road.relay("--until-caught-up", batch_rows=10) as relay:
        relay.wait_event("relay.holds")
        assert relay.stop() == 69
    late = outbox({**road.env, "OUTBOX_BATCH_ROWS": "10"}, "relay", "--until-caught-up", "--timeout", "0.5")
    assert late.returncode == 69
    assert "not caught up" in late.stderr
    road.drain()


def test_two_relays_that_start_at_once_end_as_one(road: Road) -> None:
    """Whoever is fenced while it takes over tries again or stops with the message; one is left, and publishes."""
    topic = road.add_type("thing")
    with road.relay() as a, road.relay() as b, road.relay() as c:
        relays = [a, b, c]
        eventually(
            lambda: all(one.process.poll() is not None or "relay.holds" in one.log.read_text() for one in relays)
        )
        # One that has nothing to publish learns of it when there is something.
        road.sql("SELECT outbox.put('thing', '1', '{}')")
        eventually(lambda: sum(one.process.poll() is None for one in relays) == 1, seconds=60, what="one is left")
        assert [one.process.returncode for one in relays if one.process.poll() is not None] == [75, 75]
        eventually(lambda: len(records(road.kafka, topic)) == 1)


def test_a_copy_with_ids_handed_out_again_is_adopted_in_the_order_of_time(road: Road) -> None:
    """Double ids become different ones, and what pruning went past does not come back, whatever xid it bears."""
    topic = road.add_type("thing")
    old = "SELECT outbox.put('thing', 'k' || n, '\"old\"') FROM generate_series(1, 5) n"
    new = "SELECT outbox.put('thing', 'k' || n, '\"new\"') FROM generate_series(1, 3) n"
    road.sql("SELECT outbox.put('thing', 'pruned', '\"old\"')")
    road.sql(old)
    road.drain()
    road.sql(
        "ALTER SEQUENCE outbox.entries_id_seq RESTART 2",
        "UPDATE outbox.settings SET removed_id = 1",
        # Of another cluster, which was ahead.
        "UPDATE outbox.entries SET xid = '99999999'",
    )
    road.sql(new)
    refused = outbox(road.env, "relay", "--until-caught-up")
    assert (refused.returncode, "outbox adopt" in refused.stderr) == (78, True)
    must(road.env, "adopt", "--yes")
    road.drain(batch_rows=1)
    road.sql("SELECT outbox.put('thing', 'k9', '1')")
    road.drain()
    with psycopg.connect(road.url) as connection:
        ids = [row[0] for row in connection.execute("SELECT id FROM outbox.entries")]
    assert len(ids) == len(set(ids))
    assert live(road.kafka, topic).json == {
        "pruned": "old", "k1": "new", "k2": "new", "k3": "new", "k4": "old", "k5": "old", "k9": 1,
    }  # fmt: skip
    assert len([r for r in records(road.kafka, topic) if r.key == b"pruned"]) == 1


@pytest.mark.parametrize("doorbell", [True, False])
def test_an_idle_relay_whose_shard_was_taken_stops_without_waiting_for_an_entry(road: Road, doorbell: bool) -> None:
    """Nothing is written meanwhile: its successor said so, and Kafka confirms it."""
    road.add_type("thing")
    if not doorbell:
        road.sql("UPDATE outbox.settings SET doorbell = false")
    with road.relay(poll_interval="86400" if doorbell else "0.1") as first:
        first.wait_event("relay.holds")
        with road.relay() as second:
            second.wait_event("relay.holds")
            assert first.process.wait(30) == 75
            assert "took over" in first.log.read_text()
            assert second.stop() == 0


def test_a_relay_does_not_stop_for_a_word_that_kafka_does_not_confirm(road: Road) -> None:
    """Anybody may notify."""
    topic = road.add_type("thing")
    with road.relay(poll_interval="86400") as relay:
        relay.wait_event("relay.holds")
        road.sql("SELECT pg_notify('outbox', 'taken 0 forged')")
        road.sql("SELECT outbox.put('thing', 'one', '{}')")
        eventually(lambda: len(records(road.kafka, topic)) == 1)
        assert relay.stop() == 0


def test_the_relay_prunes_by_itself_and_is_not_held_up_by_a_reader(road: Road) -> None:
    """A slot that is locked is left for later; a server that is away while it prunes ends nothing."""
    road.add_type("thing")
    road.sql("UPDATE outbox.settings SET retention = '1 second'")
    road.sql("SELECT outbox.put('thing', n::text, '{}') FROM generate_series(1, 10) n")
    with road.relay(prune="on", prune_interval="1") as relay, psycopg.connect(road.url) as reader:
        relay.wait_event("relay.holds")
        reader.execute("SELECT count(*) FROM outbox.entries").fetchone()  # holds a lock on every slot

        def slots() -> int:
            with psycopg.connect(road.url) as connection:
                row = connection.execute(
                    "SELECT count(DISTINCT slot) FROM outbox.entries WHERE created_at < now() - interval '1 second'"
                ).fetchone()
                return row[0] if row else 0

        eventually(lambda: slots() == 1)
        # The anchor's slot stays; another one that is old and published goes, once nobody reads it.
        road.sql(
            "INSERT INTO outbox.entries (type, key, state, slot, created_at)"
            " SELECT 'thing', 'old', '{}', (outbox.slot_of(clock_timestamp()) + 3) % 12, now() - interval '1 hour'"
        )
        road.sql("SELECT outbox.put('thing', 'anchor', '{}')")
        reader.commit()
        assert relay.wait_event("relay.pruned")["entries"] == 1
        assert relay.stop() == 0
