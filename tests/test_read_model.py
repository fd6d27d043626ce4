"""A read model on the real servers: exactly once, whoever applies it, whatever is killed."""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import orjson
import psycopg
import pytest
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, not in its __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from sqlalchemy import MetaData, Table, select, update

import read_model_victim
from consume import records
from devstack.kafka import Kafka
from devstack.processes import Child
from outbox.comparison import Report, comparison
from outbox.errors import BrokerError, NeedsRebuildError, NotCaughtUpError
from outbox.kafka.reader import bounds
from outbox.kafka.subscription import Place, Subscription
from outbox.read_model import Change, Columns, Copy, Follow, Function, PostgresStore, ReadModel, SqliteStore
from outbox.read_model.compare import Comparer
from outbox.read_model.conformance import OWN, TOLD, count
from outbox.read_model.model import Running
from outbox.read_model.rebuild import Rebuild
from outbox.read_model.sql import SqlStore
from outbox.read_model.store import BadBuildError
from outbox.read_model.tables import copy_table
from outbox.wake import Wake
from relays import eventually

pytestmark = [pytest.mark.kafka]
COPY = copy_table(MetaData(), "customer_copy")
HERE = Path(__file__).parent


class Topic:
    """A topic that a test writes to as a relay does: in transactions, with the entry's id in a header."""

    def __init__(self, kafka: Kafka, name: str, *, partitions: int = 3, **settings: str) -> None:
        self.kafka, self.name = kafka, name
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
        self.make(partitions, **settings)
        self.producer = self._producer()
        self.state: dict[str, Any] = {}
        self.id = 0

    def _producer(self) -> Producer:
        producer = Producer(
            {
                "bootstrap.servers": self.kafka.bootstrap,
                "transactional.id": self.name,
                "partitioner": "murmur2_random",
                "log_level": 0,
            }
        )
        producer.init_transactions(30)
        return producer

    def make(self, partitions: int = 3, **settings: str) -> None:
        config = {"cleanup.policy": "compact", **{name.replace("_", "."): value for name, value in settings.items()}}
        self._admin.create_topics([NewTopic(self.name, partitions, 1, config=config)])[self.name].result(30)
        eventually(
            lambda: len(self._admin.list_topics(self.name, timeout=5).topics[self.name].partitions) == partitions
        )

    def grow(self, partitions: int) -> None:
        self._admin.create_partitions([NewPartitions(self.name, partitions)])[self.name].result(30)
        eventually(
            lambda: len(self._admin.list_topics(self.name, timeout=5).topics[self.name].partitions) == partitions
        )

    def forget(self) -> None:
        """Remove all records that there are, as a topic that is not only compacted does."""
        self._admin.incremental_alter_configs(
            [
                ConfigResource(
                    ResourceType.TOPIC,
                    self.name,
                    incremental_configs=[
                        ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
                    ],
                )
            ]
        )
        ends = bounds(self.kafka.bootstrap, {}, self.name)[1]
        eventually(lambda: self._forgotten(ends), what="the removal of records")
        self.state.clear()

    def _forgotten(self, ends: Mapping[int, int]) -> bool:
        asked = self._admin.delete_records([TopicPartition(self.name, p, end) for p, end in ends.items()])
        try:
            for future in asked.values():
                future.result(30)
        except KafkaException:
            return False  # the topic's policy has not arrived everywhere
        return True

    def delete(self) -> None:
        self._admin.delete_topics([self.name])[self.name].result(30)
        eventually(lambda: self.name not in self._admin.list_topics(timeout=5).topics)

    def write(self, states: Mapping[str, Any], *, abort: bool = False, entry_id: int | None = None) -> int:
        """Write states (None: a tombstone), each under a new id, or under this one; the last id.

        One that is given is an old one, that changes nothing, but for 0, which is of no entry.
        """
        self.producer.begin_transaction()
        for key, state in states.items():
            number = entry_id
            if number is None:
                self.id += 1
                number = self.id
            value = None if state is None else state if isinstance(state, bytes) else orjson.dumps(state)
            self.producer.produce(self.name, value, key, headers=[("outbox-id", b"%d" % number)])
            if not abort and not entry_id:
                self.state.pop(key, None)
                if state is not None:
                    self.state[key] = state
        if abort:
            self.producer.flush(30)
            self.producer.abort_transaction(30)
        else:
            self.producer.commit_transaction(30)
        return self.id


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], SqlStore]:
    """Makes a store, each time the same one."""
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / "model.db")
    url = request.getfixturevalue("make_database")()
    return lambda: PostgresStore(url)


@pytest.fixture
def topic(kafka: Kafka, outbox_name: str) -> Topic:
    """A topic of the test's own."""
    return Topic(kafka, f"{outbox_name}.customer")


def a_model(store: SqlStore, topic: Topic, into: Any = None, **settings: Any) -> ReadModel:
    """A read model of the topic, with tables."""
    follow = Follow(topic.name, into or Copy(COPY), type="customer")
    model = ReadModel(topic.name, store, [follow], bootstrap=topic.kafka.bootstrap, check_seconds=0.1, **settings)
    store.create(model.declared)
    return model


def copied(store: SqlStore, table: Table = COPY) -> dict[str, Any]:
    """What the copy has."""
    with store.engine.connect().execution_options(reads=True) as connection:
        return {row.key: row.state for row in connection.execute(select(table.c.key, table.c.state))}


def test_a_copy_has_what_the_topic_says_and_follows_it(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """From the start, with tombstones, aborted transactions and control records; then what changes."""
    topic.write({f"k{n}": {"n": n} for n in range(500)})
    topic.write({f"k{n}": {"n": -1} for n in range(100)}, abort=True)
    topic.write({f"k{n}": None for n in range(0, 500, 7)})
    topic.write({"k1": {"n": "aborted"}}, abort=True)
    store = make_store()
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
        assert copied(store) == topic.state
        assert running.loaded
        topic.write({"k1": {"n": "later"}, "k2": None, "new": {"n": 1}})
        running.wait_for("customer", "new", topic.id, timeout=30)
        running.wait_for("customer", "k2", topic.id - 1, timeout=30)
        assert copied(store) == topic.state
        assert (running.staleness() or 100) < 30


@pytest.mark.parametrize("last", ["nothing", "aborted", "open"])
def test_it_is_ready_at_the_end_that_there_was(topic: Topic, tmp_path: Path, last: str) -> None:
    """Of an empty topic at once; after an aborted transaction; below one that is open, which it does not wait for."""
    store = SqliteStore(tmp_path / "model.db")
    if last != "nothing":
        topic.write({"a": {}, "b": {}})
    if last == "aborted":
        topic.write({"a": {"wrong": 1}}, abort=True)
    if last == "open":
        topic.producer.begin_transaction()
        for n in range(50):
            topic.producer.produce(topic.name, b'{"wrong":1}', f"open{n}")
        topic.producer.flush(30)
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
        assert copied(store) == topic.state
        if last == "open":
            topic.producer.commit_transaction(30)
            eventually(lambda: len(copied(store)) == 52)


def test_an_older_state_never_comes_back(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """Not over a newer row, not of what was deleted; what comes from no entry is applied as the log orders it."""
    store = make_store()
    with a_model(store, topic).running() as running:
        topic.write({"a": {"v": 5}}, entry_id=5)
        topic.write({"gone": {"v": 6}}, entry_id=6)
        topic.write({"gone": None}, entry_id=7)
        topic.write({"a": {"v": 4}, "gone": {"v": 3}}, entry_id=4)
        topic.write({"end": {}}, entry_id=8)
        running.wait_for("customer", "end", 8, timeout=30)
        assert copied(store) == {"a": {"v": 5}, "end": {}}
        topic.write({"a": {"v": "backfilled"}}, entry_id=0)
        eventually(lambda: copied(store)["a"] == {"v": "backfilled"})
        topic.write({"a": {"v": 4}}, entry_id=4)
        topic.write({"end": {"v": 9}}, entry_id=9)
        running.wait_for("customer", "end", 9, timeout=30)
        assert copied(store)["a"] == {"v": "backfilled"}


def test_reading_ones_own_writes_gives_up_in_time(topic: Topic, tmp_path: Path) -> None:
    """With an error that says what it waited for."""
    with a_model(SqliteStore(tmp_path / "model.db"), topic).running() as running:
        running.wait_ready(60)
        with pytest.raises(NotCaughtUpError, match='entry 99 of customer "a"'):
            running.wait_for("customer", "a", 99, timeout=0.2)


def test_columns_and_a_bad_message_that_is_parked_superseded_and_retried(
    make_store: Callable[[], SqlStore], topic: Topic
) -> None:
    """The rest goes on; a later state takes its place; after a function was mended it is applied."""
    store = make_store()
    names: list[Callable[[Change], Any]] = [lambda change: change.state["name"].strip()]

    def name(change: Change) -> Any:
        return names[-1](change)

    own = Columns(OWN, {"name": name, "price": "price"})
    model = a_model(store, topic, own)
    good = {f"k{n}": {"name": f"n{n}", "price": n} for n in range(100)}
    with model.running() as running:
        topic.write(good | {"bad": {"price": 1}, "worse": b"rubbish", "superseded": {"name": 5}})
        topic.write({"superseded": {"name": "well"}})
        running.wait_for("customer", "superseded", topic.id, timeout=30)
        eventually(lambda: len(list(model.parked())) == 2)
        reasons = {one.key: one.reason for one in model.parked()}
        assert "cannot be applied" in reasons["bad"]
        assert "cannot be decoded" in reasons["worse"]
    store.open(model.declared)
    with store.transaction(reads=True) as transaction:
        held = transaction.held(model.declared.follows[0], [*good, "bad", "superseded"])
    assert len(held) == 101
    names.append(lambda change: change.state.get("name", "?"))
    done = model.retry()
    assert (done.changes, done.parked) == (1, 1)
    assert [one.key for one in model.parked()] == ["worse"]
    assert dict(store.rows(model.declared.follows[0]))["bad"]["name"] == "?"
    store.close()


def told(store: SqlStore) -> dict[str, int]:
    with store.engine.connect().execution_options(reads=True) as connection:
        return {row.key: row.times for row in connection.execute(select(TOLD.c.key, TOLD.c.times))}


def test_each_message_is_told_once_by_whoever_of_three_applies_it(
    make_store: Callable[[], SqlStore], topic: Topic
) -> None:
    """While members come and go under load, each of which has applied some of it: what a key counts is one."""
    stores = [make_store() for _ in range(3)]
    quick = {"heartbeat.interval.ms": "500", "session.timeout.ms": "6000"}
    models = [a_model(store, topic, Function(count, writes=[TOLD]), kafka=quick) for store in stores]

    def goes_on(running: Running) -> None:
        before = running.counts.records
        eventually(lambda: running.counts.records > before + 20, what="that a member applies something")

    with writing_to(topic), models[0].running() as first:
        goes_on(first)
        with models[1].running() as second:
            goes_on(second)
            with models[2].running() as third:
                goes_on(third)
                goes_on(first)
            goes_on(second)
        goes_on(first)
    with models[0].running() as last:
        last.wait_ready(60)
        assert {times for key, times in told(stores[0]).items() if key.startswith("k")} == {1}
        assert told(stores[0]).keys() == topic.state.keys()


def test_a_rebuild_under_load_swaps_without_a_moment_of_missing_data(
    make_store: Callable[[], SqlStore], topic: Topic
) -> None:
    """Asked for while messages come; whoever reads finds every row that was there from the start, all the time."""
    store = make_store()
    model = a_model(store, topic)
    topic.write({f"k{n}": {"n": n} for n in range(2000)})
    over = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not over.is_set():
            with store.engine.connect().execution_options(reads=True) as connection:
                seen.append(len(connection.execute(select(COPY.c.key).where(COPY.c.key < "k2")).fetchall()))

    with model.running() as running:
        running.wait_ready(60)
        whole = sum(f"k{n}" < "k2" for n in range(2000))
        looking = threading.Thread(target=look)
        looking.start()
        store.ask_rebuild("for the test")
        n = 0
        while store.facts().rebuild is not None:
            topic.write({f"k{n % 2000}": {"n": -n}})
            n += 1
        over.set()
        looking.join()
        topic.write({"end": {}})
        running.wait_for("customer", "end", topic.id, timeout=30)
        assert copied(store) == topic.state
    assert set(seen) == {whole}


def test_another_mapping_is_refused_or_rebuilt_as_the_settings_say(
    make_store: Callable[[], SqlStore], topic: Topic
) -> None:
    """The rows are those of the new one afterwards, all of them."""
    store = make_store()
    topic.write({f"k{n}": {"name": f"n{n}", "price": n} for n in range(300)})
    with a_model(store, topic, Columns(OWN, {"name": "name"})).running() as running:
        running.wait_ready(60)
    other = Columns(OWN, {"name": "name", "price": "price"})
    with pytest.raises(NeedsRebuildError, match="mapping was changed"), a_model(
        store, topic, other, on_mapping_change="refuse"
    ).running() as running:  # fmt: skip
        running.wait_ready(30)
    with a_model(store, topic, other).running():
        eventually(lambda: {row["price"] for _, row in store.rows(Follow(topic.name, other))} == set(range(300)))


def test_a_topic_that_was_made_anew_is_noticed_and_followed(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """What it held before is gone from the copy, once the new one is read."""
    store = make_store()
    topic.write({f"k{n}": {"n": n} for n in range(50)})
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
    topic.delete()
    topic.make()
    topic.state.clear()
    topic.producer = topic._producer()
    topic.write({"only": {"n": 1}})
    with a_model(store, topic).running():
        eventually(lambda: copied(store) == topic.state)


def swapped(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why rebuilds were made, those that ended."""
    events = [(record.__dict__.get("outbox_event"), record.__dict__.get("outbox_fields")) for record in caplog.records]
    reasons = [fields["why"] for name, fields in events if name == "read_model.rebuilding" and fields]
    return reasons[: sum(name == "read_model.swapped" for name, _ in events)]


def test_what_a_topic_has_forgotten_before_it_was_read_is_made_up_for_by_a_rebuild(
    topic: Topic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that were removed from the topic's start while nobody read; the copy is what the topic says then."""
    caplog.set_level("INFO", "outbox.read_model")
    store = SqliteStore(tmp_path / "model.db")
    topic.write({f"k{n}": {"n": n} for n in range(50)})
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
    topic.write({f"k{n}": {"n": -n} for n in range(50)})
    topic.forget()
    topic.write({"only": {"n": 1}})
    with a_model(store, topic).running():
        eventually(lambda: copied(store) == {"only": {"n": 1}})
        eventually(lambda: swapped(caplog))
    assert "has forgotten what was not read yet" in swapped(caplog)[0]


def was_away(store: SqlStore, model: ReadModel) -> None:
    """Say that a model was last read to its end two days ago."""
    store.open(model.declared)
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)
    with store.engine.begin() as connection:
        connection.execute(update(store.books.topics).values(current_at=long_ago))


def test_a_consumer_that_was_away_for_longer_than_tombstones_are_kept_is_rebuilt(
    kafka: Kafka, outbox_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have missed a deletion; with `refuse` it says so and ends."""
    caplog.set_level("INFO", "outbox.read_model")
    topic = Topic(kafka, f"{outbox_name}.short", delete_retention_ms="500")
    store = SqliteStore(tmp_path / "model.db")
    topic.write({"a": {"n": 1}, "gone": {"n": 1}})
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
        assert running.staleness() is not None
    was_away(store, a_model(store, topic))
    with (
        pytest.raises(NeedsRebuildError, match="its tombstones are kept for"),
        a_model(store, topic, on_outrun="refuse").running() as running,
    ):
        running.wait_ready(60)
    with a_model(store, topic).running():
        eventually(lambda: swapped(caplog))
    assert "its tombstones are kept for" in swapped(caplog)[0]


def test_partitions_that_are_added_are_read_and_keys_that_move_keep_their_order(
    topic: Topic, make_store: Callable[[], SqlStore]
) -> None:
    """What a key had in its old partition is older than what it has in the new one, whichever is read first."""
    store = make_store()
    topic.write({f"k{n}": {"n": n} for n in range(200)})
    with a_model(store, topic, kafka={"topic.metadata.refresh.interval.ms": "200"}).running() as running:
        running.wait_ready(60)
        topic.grow(8)
        topic.producer = topic._producer()
        topic.write({f"k{n}": {"n": n + 1000} for n in range(200)})
        eventually(lambda: copied(store) == topic.state)


@pytest.mark.acceptance
@pytest.mark.timeout(300)
def test_after_real_compaction_of_a_million_records_it_is_ready_once_and_right(
    tmp_path: Path, outbox_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With tombstones, marks of transactions, and aborted ones between them, and a last one that was aborted."""
    caplog.set_level("INFO", "outbox.read_model")
    with Kafka(tmp_path / "kafka", properties={"log.cleaner.backoff.ms": "200"}) as kafka:
        settings = {"segment_bytes": "2000000", "min_cleanable_dirty_ratio": "0.01", "delete_retention_ms": "100"}
        topic = Topic(kafka, outbox_name, partitions=2, **settings)
        for n in range(10):
            topic.write({f"k{i}": {"n": n, "i": i} for i in range(100_000)})
            topic.write({f"k{i}": {"n": "aborted"} for i in range(n, 1000, 10)}, abort=True)
        topic.write({f"k{i}": None for i in range(0, 100_000, 9)})
        topic.write({"k1": {"n": "aborted"}}, abort=True)
        eventually(lambda: len(records(kafka, topic.name)) < 400_000, seconds=120, what="compaction")
        store = SqliteStore(tmp_path / "model.db")
        lefts: list[int] = []
        with a_model(store, topic).running() as running:
            running.wait_ready(120, told=lefts.append)
            assert copied(store) == topic.state
        assert max(lefts) > 0
    ready = [record for record in caplog.records if record.__dict__.get("outbox_event") == "read_model.ready"]
    assert len(ready) == 1


def test_it_serves_and_starts_while_kafka_is_down_and_goes_on_after(tmp_path: Path, outbox_name: str) -> None:
    """What was whole once is served, and said to be old."""
    with Kafka(tmp_path / "kafka") as kafka:
        topic = Topic(kafka, outbox_name)
        topic.write({"a": {"n": 1}})
        store = SqliteStore(tmp_path / "model.db")
        model = a_model(store, topic)
        with model.running() as running:
            running.wait_ready(60)
            kafka.stop()
            old = running.staleness() or 0
            eventually(lambda: (running.staleness() or 0) > old + 1)
            assert copied(store) == {"a": {"n": 1}}
        with model.running() as running:
            eventually(lambda: running.loaded)
            assert not running.ready
            assert copied(store) == {"a": {"n": 1}}
            kafka.start()
            topic.producer = topic._producer()
            topic.write({"a": {"n": 2}})
            running.wait_for("customer", "a", topic.id, timeout=90)
            running.wait_ready(60)


def test_it_is_compared_with_its_topic(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """While it is kept: equal; a row that somebody changed, one more, one less."""
    store = make_store()
    into = Columns(OWN, {"name": "name", "price": "price"})
    model = a_model(store, topic, into)
    topic.write({f"k{n}": {"name": f"n{n}", "price": n / 4} for n in range(300)})
    topic.write({"k5": None, "k6": {"name": "later", "price": None}})

    def compared() -> Report:
        with comparison() as found:
            comparer = Comparer(model.declared, store, model.settings, model.declared.follows[0], seconds=30)
            return comparer.run(found)

    with model.running() as running:
        running.wait_ready(60)
        assert (compared().equal, compared().different) == (299, 0)
        with store.engine.begin() as connection:
            connection.execute(OWN.update().where(OWN.c.key == "k7").values(name="wrong"))
            connection.execute(OWN.delete().where(OWN.c.key == "k8"))
            connection.execute(OWN.insert().values(key="more", name="x", entry_id=1))
        assert compared().examples == {"stale": ["k7"], "missing": ["k8"], "orphaned": ["more"]}


# -- killed, frozen ------------------------------------------------------------------------------------------------


class Victim:
    """A consumer that kills or freezes itself somewhere, or runs on until the block ends."""

    def __init__(self, place: str, number: int, url: str, topic: Topic, log: Path, *, name: str = "one") -> None:
        command = [sys.executable, "-m", "read_model_victim", place, str(number), url]
        env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._log, self._from = log, log.stat().st_size if log.exists() else 0
        self.child = Child([*command, topic.kafka.bootstrap, topic.name, name], log=log, env=env, cwd=HERE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.stop(signal.SIGKILL)

    def dies(self) -> bool:
        """Whether it kills itself, in time."""
        return self.child.wait(60) and self.child.exit_code() == -signal.SIGKILL

    def is_frozen(self) -> bool:
        """Whether it has stopped itself: the process's state, as the system says it."""
        return Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def reads(self) -> bool:
        """Whether it has been given partitions."""
        return any(fields["places"] != "none" for fields in self.said("read_model.assigned"))

    def said(self, event: str) -> list[dict[str, Any]]:
        """The events of a name."""
        lines = self._log.read_bytes()[self._from :].decode().splitlines()
        return [fields for line in lines if line.startswith("{") and (fields := orjson.loads(line))["event"] == event]


@pytest.fixture
def applied_in(make_database: Callable[..., str]) -> str:
    """A database for the victim."""
    url = make_database()
    store = PostgresStore(url)
    store.create(read_model_victim.model(url, "nowhere:1", "t").declared)
    store.close()
    return url


@contextmanager
def writing(write: Callable[[int], object]) -> Iterator[None]:
    """Somebody writes, again and again; given how often before."""
    over = threading.Event()

    def go_on() -> None:
        n = 0
        while not over.wait(0.002):
            write(n)
            n += 1

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


def writing_to(topic: Topic, *, entry_id: int | None = None) -> AbstractContextManager[None]:
    """Somebody writes: keys of one message each, and a few hot ones."""
    return writing(lambda n: topic.write({f"k{n}": {"n": n}, f"hot{n % 5}": {"n": n}}, entry_id=entry_id))


def catch_up(url: str, topic: Topic) -> None:
    """One more member, until it is ready."""
    model = read_model_victim.model(url, topic.kafka.bootstrap, topic.name)
    with closing(Wake()) as wake, closing(model.store):
        assert model.run(wake, until_ready=True)


def counts(url: str) -> dict[str, tuple[str, int]]:
    """Of each key the state, and how often it was told."""
    with psycopg.connect(url) as connection:
        return {row[0]: row[1:] for row in connection.execute("SELECT key, state, times FROM applied")}


def assert_told_once(url: str, topic: Topic) -> None:
    """The table is what the topic says, and each message of a key that has one was told once."""
    catch_up(url, topic)
    found = counts(url)
    assert {key: state for key, (state, _) in found.items()} == {key: str(s["n"]) for key, s in topic.state.items()}
    assert {times for key, (_, times) in found.items() if key.startswith("k")} == {1}


def goes_on(url: str, *, by: int = 200) -> None:
    """Wait until somebody has applied so many messages more."""
    before = len(counts(url))
    eventually(lambda: len(counts(url)) > before + by, seconds=90, what="that somebody applies messages")


@pytest.mark.postgres
@pytest.mark.timeout(900)
def test_killed_at_every_boundary_each_message_is_applied_once(applied_in: str, topic: Topic, tmp_path: Path) -> None:
    """Fifty times, under load: what a message's key counts is one, and the table is what the topic says."""
    with writing_to(topic):
        for number in range(50):
            place = read_model_victim.PLACES[number % len(read_model_victim.PLACES)]
            with Victim(place, 3 + number % 4, applied_in, topic, tmp_path / "log") as dying:
                assert dying.dies(), (tmp_path / "log").read_text()[-2000:]
    assert_told_once(applied_in, topic)


@pytest.mark.postgres
def test_wrong_offsets_in_kafka_after_the_data_apply_twice(
    applied_in: str, kafka: Kafka, outbox_name: str, tmp_path: Path
) -> None:
    """The same count shows it."""
    topic = Topic(kafka, f"{outbox_name}.wrong", partitions=1)
    topic.write({f"k{n}": {"n": n} for n in range(200)})
    for batches in (1, 2):
        with Victim("wrong", batches, applied_in, topic, tmp_path / "log") as dying:
            assert dying.dies()
    assert 2 in {times for _, times in counts(applied_in).values()}


@pytest.mark.postgres
def test_processes_that_come_and_go_apply_each_message_once(applied_in: str, topic: Topic, tmp_path: Path) -> None:
    """Three of them; two are killed under load, and each had partitions of its own."""
    with ExitStack() as stack:
        stack.enter_context(writing_to(topic))
        for name in ("a", "b", "c"):
            member = stack.enter_context(Victim("never", 1, applied_in, topic, tmp_path / name, name="-"))
            eventually(member.reads, what="that it is given partitions")
            goes_on(applied_in)
            if name != "a":
                member.child.stop(signal.SIGKILL)
                goes_on(applied_in)
    assert_told_once(applied_in, topic)


@pytest.mark.postgres
@pytest.mark.parametrize("place", read_model_victim.FREEZING)
def test_a_frozen_member_that_wakes_up_with_a_batch_applies_nothing_twice(
    applied_in: str, topic: Topic, tmp_path: Path, place: str
) -> None:
    """Stopped before it applies, beyond its session, and woken after another has applied the same messages.

    They come from no entry, so that nothing but the claim of their partition tells that they are old. One whose store
    does not ask whether it is still its own applies them twice, and so do others after it.
    """
    with writing_to(topic, entry_id=0), Victim(place, 8, applied_in, topic, tmp_path / "log") as frozen:
        eventually(frozen.is_frozen)
        with Victim("never", 1, applied_in, topic, tmp_path / "other", name="-"):
            goes_on(applied_in)
            frozen.child.send(signal.SIGCONT)
            if place == "unfenced":
                eventually(lambda: 2 in {times for _, times in counts(applied_in).values()})
                return
            eventually(lambda: frozen.said("read_model.fenced"), what="that it is fenced")
            goes_on(applied_in)
    assert_told_once(applied_in, topic)


# -- rebuilds ------------------------------------------------------------------------------------------------------


def until_ready(model: ReadModel) -> None:
    """Run it until it is ready, and what it was asked for is done."""
    with closing(Wake()) as wake, closing(model.store):
        assert model.run(wake, until_ready=True)


def test_a_mapping_that_follows_a_topic_no_more_takes_its_place(
    make_store: Callable[[], SqlStore], topic: Topic, outbox_name: str
) -> None:
    """What it had read of that topic holds nothing up."""
    other = Topic(topic.kafka, f"{outbox_name}.other")
    topic.write({"a": {"n": 1}})
    other.write({"b": {"name": "n"}})
    store = make_store()
    copy, columns = Follow(topic.name, Copy(COPY)), Follow(other.name, Columns(OWN, {"name": "name"}))
    both = ReadModel(topic.name, store, [copy, columns], bootstrap=topic.kafka.bootstrap, check_seconds=0.1)
    store.create(both.declared)
    until_ready(both)
    one = ReadModel(topic.name, store, [copy], bootstrap=topic.kafka.bootstrap, check_seconds=0.1)
    until_ready(one)
    store.open(one.declared)
    assert store.facts().fingerprint == one.declared.fingerprint
    with store.transaction(reads=True) as transaction:
        assert {place.topic for place in transaction.offsets()} == {topic.name}
    assert copied(store) == topic.state
    store.close()


def test_a_rebuild_begins_again_when_its_topic_is_made_anew(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """What it has read is another topic's, of which this one has fewer records."""
    store = make_store()
    topic.write({f"k{n}": {"n": n} for n in range(100)})
    model = a_model(store, topic)
    until_ready(model)
    made: list[int] = []

    def make_anew(done: int, _of: int) -> None:
        if made:
            return
        made.append(done)
        topic.delete()
        topic.make()
        topic.state.clear()
        topic.producer = topic._producer()
        topic.write({"only": {"n": 1}})

    assert model.rebuild(told=make_anew)
    assert copied(store) == topic.state
    store.close()


@pytest.mark.parametrize(("minutes", "begun"), [(50, 1), (70, 2)])
def test_a_rebuild_that_was_interrupted_for_longer_than_tombstones_are_kept_begins_again(
    kafka: Kafka, outbox_name: str, tmp_path: Path, minutes: int, begun: int
) -> None:
    """It may have missed a deletion; after a shorter time it goes on."""
    topic = Topic(kafka, f"{outbox_name}.short", delete_retention_ms="3600000")
    topic.write({"a": {"n": 1}})
    store = SqliteStore(tmp_path / "model.db")
    model = a_model(store, topic)
    until_ready(model)
    store.open(model.declared)
    told: list[int] = []

    def interrupt(done: int, _of: int) -> None:
        if not told and rebuild._answered_at is not None:
            rebuild._answered_at -= dt.timedelta(minutes=minutes)
        told.append(done)

    rebuild = Rebuild(model.declared, store, model.settings, told=interrupt)
    with closing(Wake()) as wake, mock.patch.object(store, "begin_build", wraps=store.begin_build) as begin_build:
        assert rebuild.run(wake, why="for the test")
    assert begin_build.call_count == begun
    store.close()


def test_a_mapping_that_fits_no_message_does_not_take_away_what_is_served(topic: Topic, tmp_path: Path) -> None:
    """It is said what is parked, and why."""
    store = SqliteStore(tmp_path / "model.db")
    topic.write({f"k{n}": {"name": f"n{n}"} for n in range(50)})
    model = a_model(store, topic, Columns(OWN, {"name": "name"}))
    until_ready(model)
    wrong = a_model(store, topic, Columns(OWN, {"name": "title"}))
    with pytest.raises(BadBuildError, match=r"parks 50 of 50 messages, where 0 .*NOT NULL"):
        wrong.rebuild()
    assert len(list(store.rows(model.declared.follows[0]))) == 50
    store.close()


def test_after_the_rebuild_that_a_person_has_asked_for_it_goes_on(topic: Topic, tmp_path: Path) -> None:
    """It is as new as the topic was then."""
    store = SqliteStore(tmp_path / "model.db")
    topic.write({"a": {"n": 1}})
    until_ready(a_model(store, topic))
    was_away(store, a_model(store, topic))
    with pytest.raises(NeedsRebuildError, match="its tombstones are kept for"):
        until_ready(a_model(store, topic, on_outrun="refuse"))
    assert a_model(store, topic).rebuild()
    until_ready(a_model(store, topic, on_outrun="refuse"))


# -- members, versions, topics that come later ---------------------------------------------------------------------


def test_of_two_processes_of_one_name_one_ends_and_says_so(topic: Topic, tmp_path: Path) -> None:
    """It would wait for ever otherwise: Kafka gives it nothing any more. The other one goes on."""
    quick = {"heartbeat.interval.ms": "500", "session.timeout.ms": "6000"}
    stores = [SqliteStore(tmp_path / "model.db") for _ in range(2)]
    both = [Running(a_model(store, topic, instance="same", kafka=quick)) for store in stores]
    for one in both:
        one.start()
        one.wait_ready(60)
    (left,) = eventually(lambda: [one for one in both if one.ready] if not all(one.ready for one in both) else [])
    topic.write({"a": {"n": 1}})
    left.wait_for("customer", "a", topic.id, timeout=60)
    left.stop()
    both.remove(left)
    with pytest.raises(BrokerError, match='instance name "same"'):
        both[0].stop()


def test_a_topic_that_is_missing_at_first_is_read_when_it_comes(
    kafka: Kafka, outbox_name: str, topic: Topic, tmp_path: Path
) -> None:
    """The other one is kept meanwhile."""
    store, later = SqliteStore(tmp_path / "model.db"), f"{outbox_name}.later"
    follows = [Follow(topic.name, Copy(COPY), type="customer"), Follow(later, Columns(OWN, {"name": "name"}))]
    quick = {"topic.metadata.refresh.interval.ms": "200"}
    model = ReadModel(outbox_name, store, follows, bootstrap=kafka.bootstrap, check_seconds=0.1, kafka=quick)
    store.create(model.declared)
    topic.write({"a": {"n": 1}})
    with model.running() as running:
        running.wait_for("customer", "a", topic.id, timeout=30)
        assert (copied(store), running.ready) == ({"a": {"n": 1}}, False)
        other = Topic(kafka, later)
        other.write({"b": {"name": "x"}})
        running.wait_ready(60)
        running.wait_for(later, "b", other.id, timeout=30)
        # And one that goes does not hold the other up either.
        other.delete()
        topic.write({"a": {"n": 2}})
        running.wait_for("customer", "a", topic.id, timeout=30)
        eventually(lambda: (running.staleness() or 0) > 2)


def test_a_topic_that_is_made_anew_while_it_is_followed_is_followed_on(topic: Topic, tmp_path: Path) -> None:
    """Within seconds, by a rebuild."""
    store = SqliteStore(tmp_path / "model.db")
    topic.write({f"k{n}": {"n": n} for n in range(50)})
    with a_model(store, topic).running() as running:
        running.wait_ready(60)
        topic.delete()
        topic.make()
        topic.state.clear()
        topic.producer = topic._producer()
        topic.write({"only": {"n": 1}})
        eventually(lambda: copied(store) == topic.state)
        topic.write({"more": {"n": 2}})
        running.wait_for("customer", "more", topic.id, timeout=60)


def test_a_new_version_takes_over_from_the_old_one_that_runs(make_store: Callable[[], SqlStore], topic: Topic) -> None:
    """It rebuilds by its own mapping beside it; then the old one ends, and has left nothing of its own."""
    stores = [make_store(), make_store()]
    topic.write({f"k{n}": {"name": f"n{n}", "price": n} for n in range(300)})
    old = a_model(stores[0], topic, Columns(OWN, {"name": "name"}))
    new = a_model(stores[1], topic, Columns(OWN, {"name": "name", "price": "price"}))
    before = Running(old)
    before.start()
    before.wait_ready(60)
    with writing_prices(topic), new.running() as after:
        after.wait_ready(60)
        eventually(lambda: not before.ready, what="that the old one ends")
    with pytest.raises(NeedsRebuildError, match="another version"):
        before.stop()
    with new.running() as after:
        after.wait_ready(60)
        rows = dict(stores[1].rows(new.declared.follows[0]))
        assert {key: (row["name"], row["price"]) for key, row in rows.items()} == {
            key: (state["name"], state["price"]) for key, state in topic.state.items()
        }


def writing_prices(topic: Topic) -> AbstractContextManager[None]:
    """Somebody writes names and prices."""
    return writing(lambda n: topic.write({f"k{n % 300}": {"name": f"later{n}", "price": n}}))


def test_a_member_that_joins_again_and_ends_at_once_ends(topic: Topic) -> None:
    """The client would abort the process otherwise, between leaving and joining."""
    for _ in range(3):
        subscription = Subscription(topic.kafka.bootstrap, {}, [topic.name], group=topic.name)
        eventually(lambda: subscription.fetch(10, 0.1).assigned)  # noqa: B023  called here
        subscription.begin({Place(topic.name, 0): 0})
        subscription.rejoin()
        subscription.close()
