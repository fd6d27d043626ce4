"""What a read model decides, without servers: Kafka is a log in memory that fails where a test says so.

That each message is applied once on the real servers is shown in `test_read_model.py`.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import pytest
from confluent_kafka import KafkaError, KafkaException
from sqlalchemy import (
    REAL,
    BigInteger,
    Column,
    DateTime,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    select,
)

from outbox.comparison import comparison
from outbox.errors import (
    BrokerError,
    BrokerUnavailableError,
    ConfigError,
    NeedsRebuildError,
    NotCaughtUpError,
    OutboxError,
    ParkedError,
    StoreUnavailableError,
)
from outbox.kafka import reader
from outbox.kafka.reader import Record
from outbox.kafka.subscription import Bounds, Fetched, Place, Subscription
from outbox.read_model import Columns, Copy, Follow, ReadModel, SqliteStore, consumer, copy_table, rebuild
from outbox.read_model.applier import Applier, GapError
from outbox.read_model.change import Bad, Change, Raw, decide, decode_json, read
from outbox.read_model.compare import Comparer
from outbox.read_model.consumer import Consumer, Settings
from outbox.read_model.currency import Currency
from outbox.read_model.declared import Declared
from outbox.read_model.model import Running
from outbox.read_model.rows import converter, maker
from outbox.read_model.store import BadBuildError, Claim, RefusedError
from outbox.read_model.transaction import SqlTransaction
from outbox.wake import Wake
from relays import eventually

COPY = copy_table(MetaData(), "copied")
NAMED = Table(
    "named", MetaData(), Column("key", Text, primary_key=True), Column("name", Text), Column("size", BigInteger),
    Column("entry_id", BigInteger),
)  # fmt: skip
FOLLOW = Follow("t", Copy(COPY))


class Log:
    """Topics in memory, and what goes wrong with them."""

    def __init__(self, *topics: str, partitions: int = 1) -> None:
        self.records: dict[Place, list[Record]] = {Place(t, p): [] for t in topics for p in range(partitions)}
        self.first: dict[Place, int] = {}
        # Partitions that the group gives, and of which the brokers do not know yet.
        self.unknown: set[Place] = set()
        self.ids = dict.fromkeys(topics, "first")
        self.joins = 0
        # Raised by a fetch, which has read on, each once.
        self.fails: list[OutboxError] = []
        self.away: OutboxError | None = None

    def write(self, key: str, state: Any, entry_id: int, *, topic: str = "t", partition: int = 0) -> None:
        there = self.records[Place(topic, partition)]
        value = None if state is None else state if isinstance(state, bytes) else orjson.dumps(state)
        there.append(Record(partition, len(there), 0, key.encode(), value, [("outbox-id", b"%d" % entry_id)]))

    def make_anew(self, topic: str = "t") -> None:
        self.ids[topic] = "second"
        for place in self.records:
            if place.topic == topic:
                self.records[place] = []

    def subscription(self, *_arguments: object, group: str | None, **_more: object) -> Subscribed:
        return Subscribed(self, group)


class Subscribed:
    """A subscription to the log: all partitions are its own."""

    def __init__(self, log: Log, group: str | None) -> None:
        self._log, self._joined = log, group is not None
        self._next: dict[Place, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        pass

    def rejoin(self) -> None:
        self._next, self._joined = {}, True

    def begin(self, offsets: Mapping[Place, int]) -> None:
        self._next = dict(offsets)

    def fetch(self, most: int, _seconds: float) -> Fetched:
        if self._joined:
            self._joined = False
            self._log.joins += 1
            return Fetched(assigned=self.places())
        fetched = Fetched(since=dict(self._next))
        for place, offset in self._next.items():
            if found := self._log.records[place][offset : offset + most]:
                fetched.records[place] = found
                fetched.reached[place] = self._next[place] = found[-1].offset + 1
        if not fetched.records:
            time.sleep(0.001)
        elif self._log.fails:
            raise self._log.fails.pop()
        return fetched

    def report(self, _offsets: Mapping[Place, int]) -> None:
        pass

    def places(self) -> list[Place]:
        return sorted(self._log.records)

    def bounds(self, places: Sequence[Place]) -> dict[Place, Bounds]:
        if self._log.away is not None:
            raise self._log.away
        there = self._log.records.keys() - self._log.unknown
        return {
            place: Bounds(self._log.first.get(place, 0), len(self._log.records[place]))
            for place in places
            if place in there
        }

    def identities(self) -> dict[str, str]:
        return dict(self._log.ids)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """A log of one topic, in the place of Kafka."""
    log = Log("t")
    for module in (consumer, rebuild):
        monkeypatch.setattr(module, "Subscription", log.subscription)
    monkeypatch.setattr(Consumer, "_tombstones_kept", lambda _self, _topic: 86_400_000)
    monkeypatch.setattr(consumer, "_PLACES_SECONDS", 0.0)
    return log


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """A store with the tables."""
    store = SqliteStore(tmp_path / "model.db")
    store.create(Declared("m", [FOLLOW, Follow("u", Columns(NAMED, {"name": "name"}))]))
    yield store
    store.close()


def a_model(store: SqliteStore, *follows: Follow, **settings: Any) -> ReadModel:
    return ReadModel("m", store, follows or [FOLLOW], bootstrap="none", check_seconds=0.001, **settings)


def a_consumer(store: SqliteStore, *follows: Follow, **settings: Any) -> Consumer:
    made = Consumer(Declared("m", follows or [FOLLOW]), store, Settings("none", check_seconds=0.001, **settings))
    made.open()
    return made


def steps(made: Consumer, until: Callable[[], bool]) -> None:
    """Steps until something is so; what passes is gone over, as the loop does."""

    def step() -> bool:
        try:
            made.step(0)
        except OutboxError as error:
            if not consumer.is_passing(error):
                raise
        return until()

    eventually(step)


def copied(store: SqliteStore) -> dict[str, Any]:
    with store.engine.connect().execution_options(reads=True) as connection:
        return {row.key: row.state for row in connection.execute(select(COPY.c.key, COPY.c.state))}


def said(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    """The fields of the events of a name."""
    of_name = [one for one in caplog.records if one.__dict__.get("outbox_event") == name]
    return [one.__dict__["outbox_fields"] for one in of_name]


# -- what records say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "key", "why"),
    [
        (Raw(0, 0, 0, b"k", b"{}", [("outbox-id", None)]), "k", "is no entry's id: None"),
        (Raw(0, 0, 0, b"k", b"{}", [("outbox-id", b"9223372036854775808")]), "k", "is no entry's id"),
        (Raw(0, 0, 0, b"k", b"{}", [("outbox-id", b"seven")]), "k", "is no entry's id"),
        (Raw(0, 0, 0, b"a\0b", b"{}", []), "a\\x00b", "has a NUL"),
    ],
)
def test_what_no_store_takes_is_bad_and_can_be_parked(raw: Raw, key: str, why: str) -> None:
    """Its id is none, and its texts are such as a database takes."""
    found = read(raw, decode_json)
    assert isinstance(found, Bad)
    assert (found.key, found.entry_id, why in found.reason) == (key, 0, True)
    assert "\0" not in found.key + found.reason


def test_the_greatest_id_is_one_and_a_header_of_null_is_none() -> None:
    """2^63 - 1; the content type and the cause may be null."""
    headers = [("outbox-id", b"%d" % (2**63 - 1)), ("content-type", None), ("outbox-cause", None)]
    found = read(Raw(0, 0, 0, b"k", b"{}", headers), decode_json)
    assert isinstance(found, Change)
    assert (found.entry_id, found.cause) == (2**63 - 1, None)


def test_a_reason_that_a_decoder_gives_has_no_nul() -> None:
    """Whatever it raises."""

    def decode(_value: bytes, _headers: Mapping[str, bytes]) -> object:
        raise ValueError("a\0b\ud800")

    found = read(Raw(0, 0, 0, b"k", b"{}", []), decode)
    assert isinstance(found, Bad)
    assert r"a\x00b\ud800" in found.reason


def of(entry_id: int, value: bytes = b"{}", key: bytes = b"k") -> Change | Bad:
    return read(Raw(0, entry_id, 0, key, value, [("outbox-id", b"%d" % entry_id)]), decode_json)


def test_an_older_state_does_not_take_the_place_of_a_newer_bad_one() -> None:
    """Nor an older bad one; what comes from no entry does."""
    decided = decide([of(9, b"rubbish"), of(8)], {"k": 7})
    assert (decided.apply["k"].entry_id, decided.park["k"].entry_id) == (8, 9)
    decided = decide([of(9, b"rubbish"), of(8, b"rubbish")], {"k": 7})
    assert decided.park["k"].entry_id == 9
    decided = decide([of(9, b"rubbish"), of(0)], {"k": 7})
    assert (decided.park, decided.held) == ({}, {"k": 7})


def test_of_a_key_that_none_can_have_nothing_is_held() -> None:
    """What is parked in its place may be named as another key is."""
    bad = of(5, key=b"a\0b")
    assert decide([bad], {bad.key: 9}).park == {bad.key: bad}


# -- rows ----------------------------------------------------------------------------------------------------------

TYPED = Table(
    "typed", MetaData(), Column("key", Text, primary_key=True), Column("at", DateTime(timezone=True)),
    Column("local", DateTime()), Column("price", Numeric(10, 2)), Column("whole", Numeric(10)), Column("any", Numeric),
    Column("single", REAL), Column("updated_at", DateTime()),
)  # fmt: skip


def made_of(values: Mapping[str, Any], state: Any) -> dict[str, Any]:
    change = read(Raw(0, 0, 1_700_000_000_000, b"k", orjson.dumps(state), []), decode_json)
    assert isinstance(change, Change)
    into = Columns(TYPED, values)
    return dict(zip(into.columns, maker(into)(change, 0), strict=True))


def test_times_are_utc_and_without_a_zone_where_the_column_has_none() -> None:
    """Whatever offset they come with, and whoever converts them."""
    noon = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
    said_at = "2026-01-02T14:00:00+02:00"
    for how in ("at", ("at", dt.datetime.fromisoformat), lambda change: dt.datetime.fromisoformat(change.state["at"])):
        row = made_of({"at": how, "local": how}, {"at": said_at})
        assert (row["at"], row["local"]) == (noon, noon.replace(tzinfo=None))
        assert row["at"].tzinfo is dt.UTC
    row = made_of({"at": "at", "local": "at"}, {"at": "2026-01-02T12:00:00"})
    assert (row["at"], row["local"]) == (noon, noon.replace(tzinfo=None))
    assert row["updated_at"] == dt.datetime(2023, 11, 14, 22, 13, 20)


@pytest.mark.parametrize(
    ("column", "value", "fits"),
    [
        ("price", "1.50000", True), ("price", "1.505", False), ("price", 5, True), ("price", 0.125, False),
        ("whole", "7", True), ("whole", "7.5", False), ("any", "0." + "1" * 60, True), ("price", None, True),
    ],
)  # fmt: skip
def test_a_decimal_that_does_not_fit_is_refused_not_cut(column: str, value: Any, fits: bool) -> None:
    """Also one that the service's own function makes."""
    for how in (column, (column, lambda said: Decimal(str(said)))):
        if fits:
            row = made_of({column: how}, {column: value})
            assert row[column] == (None if value is None else Decimal(str(value)))
        else:
            with pytest.raises(ValueError, match="decimal places"):
                made_of({column: how}, {column: value})


@pytest.mark.parametrize(
    ("kind", "fits", "cut"),
    [
        (Numeric(6, 2), Decimal("9999.99"), Decimal(10000)), (Numeric(2, 4), Decimal("0.0099"), Decimal("0.01")),
        (SmallInteger(), 32_767, 32_768), (Integer(), -(2**31), 2**31), (BigInteger(), 2**63 - 1, -(2**63) - 1),
        (String(3), "äöü", "abcd"),
        (DateTime(timezone=True), "2026-01-02T12:00:00.123456000Z", "2026-01-02T12:00:00.123456789Z"),
    ],
)  # fmt: skip
def test_what_one_store_would_cut_and_another_refuse_is_refused(kind: Any, fits: Any, cut: Any) -> None:
    """Before any of them is asked."""
    table = Table("t", MetaData(), Column("key", Text, primary_key=True), Column("value", kind))
    make = maker(Columns(table, {"value": lambda change: converter(table.c.value)(change.state)}))
    assert make(Change("k", fits, 1, 0, None, Raw(0, 0, 0, b"k", b"", [])), 1)[1] is not None
    with pytest.raises(ValueError, match=r"digits before|bits|characters|microseconds"):
        make(Change("k", cut, 1, 0, None, Raw(0, 0, 0, b"k", b"", [])), 1)


# -- how current ---------------------------------------------------------------------------------------------------

HERE = Place("t", 0)
BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def at(second: int) -> dt.datetime:
    return BEGIN + dt.timedelta(seconds=second)


@pytest.mark.parametrize("end", [0, 10])
def test_a_store_that_is_beyond_the_end_has_read_another_topic(end: int) -> None:
    """It is neither ready nor current; not for what it had to reach before either."""
    currency = Currency(("t",))
    assert not currency.saw({HERE: Bounds(0, end)}, {HERE: 1000}, at(0))
    assert (currency.ready, currency.staleness(at(1)), currency.behind["t"] > 0) == (False, None, True)
    currency = Currency(("t",))
    currency.saw({HERE: Bounds(0, 1000)}, {HERE: 900}, at(0))
    assert not currency.saw({HERE: Bounds(0, end)}, {HERE: 1000}, at(1))
    assert (currency.ready, currency.current_at) == (False, {})


def test_a_topic_that_is_left_out_is_not_ready_until_it_is_read_anew() -> None:
    """To the ends that it has then."""
    currency = Currency(("t",))
    currency.saw({HERE: Bounds(0, 1000)}, {HERE: 900}, at(0))
    assert not currency.saw({HERE: Bounds(0, 2000)}, {HERE: 1500}, at(1), left_out={"t"})
    assert currency.current_at == {}
    assert not currency.saw({HERE: Bounds(0, 20)}, {HERE: 10}, at(2))
    assert currency.saw({HERE: Bounds(0, 25)}, {HERE: 20}, at(3))
    assert currency.current_at == {"t": at(2)}


def test_a_topic_that_there_is_not_holds_up_being_ready_alone() -> None:
    """Its end is asked for when it is there; of the others it is known how current they are."""
    currency = Currency(("t", "later"))
    later = Place("later", 0)
    assert not currency.saw({HERE: Bounds(0, 5)}, {HERE: 5}, at(0))
    assert (currency.current_at, currency.staleness(at(1))) == ({"t": at(0)}, None)
    both = {HERE: Bounds(0, 5), later: Bounds(0, 3)}
    assert not currency.saw(both, {HERE: 5}, at(1))
    assert currency.saw(both, {HERE: 5, later: 3}, at(2))


def test_what_a_partition_has_forgotten_is_not_left() -> None:
    """Of an empty one nothing is; and of one that begins later what lies behind its beginning."""
    currency = Currency(("t",))
    other = Place("t", 1)
    currency.saw({HERE: Bounds(4, 4), other: Bounds(6, 10)}, {}, at(0))
    assert (currency.left({}), currency.left({other: 8})) == (4, 2)


# -- applying ------------------------------------------------------------------------------------------------------


def test_a_deletion_that_is_refused_is_parked_and_the_rest_goes_on(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by halving; a reference of another table may forbid it. Later it is applied by hand."""
    declared = Declared("m", [FOLLOW])
    store.open(declared)
    applier, refuses = Applier(declared, store), True
    delete = SqlTransaction.delete

    def refusing(self: SqlTransaction, follow: Follow, changes: Sequence[Change], held: Mapping[str, int]) -> None:
        if refuses and any(change.key == "k3" for change in changes):
            raise RefusedError("it is referenced")
        delete(self, follow, changes, held)

    monkeypatch.setattr(SqlTransaction, "delete", refusing)
    log = Log("t")
    for n in range(8):
        log.write(f"k{n}", {}, n + 1)
    for n in range(8):
        log.write(f"k{n}", None, n + 11)
    log.write("new", {}, 30)
    with store.transaction() as transaction:
        claim = transaction.claim(HERE)
    applied = applier.apply(Fetched({HERE: log.records[HERE][:8]}, {HERE: 8}), {HERE: claim})
    applied = applier.apply(Fetched({HERE: log.records[HERE][8:]}, {HERE: 17}), applied.claims)
    assert (applied.changes, applied.deleted, applied.parked) == (8, 7, 1)
    assert copied(store) == {"k3": {}, "new": {}}
    (parked,) = ReadModel("m", store, [FOLLOW], bootstrap="none").parked()
    assert (parked.key, parked.raw.value, "it is referenced" in parked.reason) == ("k3", None, True)
    assert applier.retry().parked == 1
    refuses = False
    assert (applier.retry().changes, copied(store), store.facts().parked) == (1, {"new": {}}, 0)


def test_what_does_not_follow_on_what_was_applied_is_not_applied(store: SqliteStore) -> None:
    """Records that were fetched and lost would be missing for good."""
    declared = Declared("m", [FOLLOW])
    store.open(declared)
    with store.transaction() as transaction:
        claim = transaction.claim(HERE)
    record = Record(0, 9, 0, b"k", b"{}", [])
    with pytest.raises(GapError):
        Applier(declared, store).apply(Fetched({HERE: [record]}, {HERE: 10}, since={HERE: 5}), {HERE: claim})
    assert copied(store) == {}
    # Compaction leaves gaps as well, which are read over.
    Applier(declared, store).apply(Fetched({HERE: [record]}, {HERE: 10}, since={HERE: 0}), {HERE: claim})
    assert copied(store) == {"k": {}}


def test_a_parked_message_that_was_superseded_goes_at_a_retry(store: SqliteStore) -> None:
    """It is not applied over what is newer."""
    declared = Declared("m", [FOLLOW])
    store.open(declared)
    newer, older = of(9), of(5, b"rubbish")
    assert isinstance(newer, Change)
    assert isinstance(older, Bad)
    with store.transaction() as transaction:
        transaction.put(FOLLOW, [newer], {"k": 9}, {})
        transaction.park(FOLLOW, [older])
    done = Applier(declared, store).retry()
    assert (done.changes, done.parked, store.facts().parked) == (0, 0, 0)


def test_what_is_parked_comes_in_pages(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, by topic and key; of a topic, of some keys."""
    monkeypatch.setattr("outbox.read_model.applier._PAGE", 3)
    model = a_model(store)
    store.open(model.declared)
    with store.transaction() as transaction:
        bad = [one for n in range(10) if isinstance(one := of(n + 1, b"rubbish", key=b"k%d" % n), Bad)]
        transaction.park(FOLLOW, bad)
    assert [one.key for one in model.parked()] == [f"k{n}" for n in range(10)]
    assert [one.key for one in model.parked("t", ["k3", "k7", "x"])] == ["k3", "k7"]
    with pytest.raises(ConfigError, match="does not follow the topic u"):
        model.parked("u")
    assert model.status().parked == 10


# -- the consumer --------------------------------------------------------------------------------------------------


def test_a_fetch_that_fails_after_it_has_read_on_loses_nothing(log: Log, store: SqliteStore) -> None:
    """What came before the error is fetched again."""
    for n in range(20):
        log.write(f"k{n}", {"n": n}, n + 1)
    log.fails = [BrokerUnavailableError("in the middle of a batch") for _ in range(3)]
    made = a_consumer(store, batch=3)
    steps(made, lambda: made.currency.ready)
    assert copied(store) == {f"k{n}": {"n": n} for n in range(20)}


def test_of_many_parked_messages_the_first_are_said(
    log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """And how many there are."""
    for n in range(20):
        log.write(f"k{n}", b"rubbish", n + 1)
    made = a_consumer(store)
    steps(made, lambda: made.currency.ready)
    assert [fields["key"] for fields in said(caplog, "read_model.parked")] == ["k0", "k1", "k2", "k3", "k4"]
    assert [fields["parked"] for fields in said(caplog, "read_model.parked_many")] == [20]


def test_a_topic_that_is_made_anew_while_it_runs_is_noticed(log: Log, store: SqliteStore) -> None:
    """A rebuild is asked for; from then on nothing of the new one is applied at the old one's offsets."""
    log.write("old", {}, 1)
    made = a_consumer(store)
    steps(made, lambda: made.currency.ready)
    log.make_anew()
    steps(made, lambda: made.rebuild is not None)
    assert "made anew" in (store.facts().rebuild or "")
    for n in range(5):
        log.write(f"k{n}", {}, n + 1)
    joins = log.joins
    for _ in range(20):
        made.step(0)
    assert (list(copied(store)), log.joins - joins <= 1) == (["old"], True)


def test_a_topic_that_is_missing_is_said_once_and_holds_no_other_up(
    log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """When it comes it is read."""
    caplog.set_level("INFO", "outbox.read_model")
    log.write("k", {}, 1)
    made = a_consumer(store, FOLLOW, Follow("u", Columns(NAMED, {"name": "name"})))
    steps(made, lambda: "t" in made.currency.current_at)
    assert (copied(store), made.currency.ready, made.currency.staleness(at(0))) == ({"k": {}}, False, None)
    assert [fields["error"] for fields in said(caplog, "read_model.waiting")] == ["there is no topic u."]
    log.records[Place("u", 0)], log.ids["u"] = [], "first"
    log.write("k", {"name": "x"}, 1, topic="u")
    made._rejoin(made._subscription)  # type: ignore[arg-type]  # as the group does
    steps(made, lambda: made.currency.ready)
    assert len(said(caplog, "read_model.resumed")) == 1


def test_a_partition_that_was_just_added_is_read_once_the_brokers_know_it(log: Log, store: SqliteStore) -> None:
    """Without joining the group again; the others are read meanwhile."""
    added = Place("t", 1)
    log.records[added], log.unknown = [], {added}
    log.write("a", {}, 1)
    log.write("b", {}, 2, partition=1)
    made = a_consumer(store)
    steps(made, lambda: "a" in copied(store))
    for _ in range(5):
        made.step(0)
    assert list(copied(store)) == ["a"]
    log.unknown.clear()
    steps(made, lambda: made.currency.ready and len(copied(store)) == 2)
    assert log.joins == 1


def test_who_was_away_before_the_first_whole_copy_may_have_missed_deletions_as_well(
    log: Log, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reading began longer ago than tombstones are kept."""
    for n in range(3):
        log.write(f"k{n}", {}, n + 1)
    made = a_consumer(store, batch=1)
    steps(made, lambda: bool(copied(store)))
    assert store.facts().began_at.keys() == {"t"}
    assert store.facts().current_at == {}
    monkeypatch.setattr(Consumer, "_tombstones_kept", lambda _self, _topic: 0)
    again = a_consumer(store)
    steps(again, lambda: again.rebuild is not None)
    assert "tombstones" in (store.facts().rebuild or "")


def test_who_may_not_ask_for_the_topics_settings_takes_a_day(
    log: Log, store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; it goes on."""
    monkeypatch.undo()
    monkeypatch.setattr(consumer, "Subscription", log.subscription)

    class Denied:
        def __init__(self, *_: object) -> None:
            raise BrokerError("Kafka denied it.")

    monkeypatch.setattr(consumer, "Admin", Denied)
    log.write("k", {}, 1)
    first, again = a_consumer(store), a_consumer(store)
    steps(first, lambda: first.currency.ready)
    steps(again, lambda: again.currency.ready)
    again._rejoin(again._subscription)  # type: ignore[arg-type]  # as the group does
    again.step(0)
    assert len(said(caplog, "read_model.kept_unknown")) == 1
    assert store.facts().rebuild is None


def test_kafka_that_is_away_does_not_keep_what_was_fetched_from_being_applied(log: Log, store: SqliteStore) -> None:
    """How far all is cannot be told then, and is said; the copy goes on."""
    made = a_consumer(store)
    steps(made, lambda: made.currency.ready)
    log.away = BrokerUnavailableError("away")
    log.write("k", {}, 1)
    steps(made, lambda: bool(copied(store)))
    with pytest.raises(BrokerUnavailableError):
        made.step(0)


# -- two versions of the service -----------------------------------------------------------------------------------

OTHER = Follow("t", Copy(COPY), version=1)


def test_who_finds_that_another_version_has_rebuilt_the_model_ends(log: Log, store: SqliteStore) -> None:
    """Where it looks, and where it claims: nothing is written by the old mapping any more."""
    made = a_consumer(store)
    steps(made, lambda: made.currency.ready)
    store.know(fingerprint=Declared("m", [OTHER]).fingerprint)
    with pytest.raises(NeedsRebuildError, match="another version of this service has rebuilt it"):
        steps(made, lambda: False)
    with pytest.raises(NeedsRebuildError):
        made._assign(made._subscription, [HERE])  # type: ignore[arg-type]
    del log


def test_a_rebuild_is_made_by_the_mapping_that_asked_for_it(log: Log, store: SqliteStore, tmp_path: Path) -> None:
    """The version before goes on with the copy that there is until then."""
    before = a_consumer(store)
    steps(before, lambda: before.currency.ready)
    with closing(SqliteStore(tmp_path / "model.db")) as theirs:
        after = a_consumer(theirs, OTHER)
        assert after.rebuild is not None
        for _ in range(5):
            before.step(0)
            time.sleep(0.002)
        assert before.rebuild is None
        # The old version asked for one of its own, and has it: then it is the new one's turn again.
        store.ask_rebuild("for another reason")
        steps(after, lambda: after.rebuild is None)
        store.ask_rebuild(None)
        steps(after, lambda: after.rebuild is not None)
        assert theirs.facts().rebuild_for == Declared("m", [OTHER]).fingerprint
    del log


# -- running -------------------------------------------------------------------------------------------------------


def test_until_ready_refuses_a_copy_of_which_everything_is_parked(log: Log, store: SqliteStore) -> None:
    """A deployment's step must not pass; a message that is rubbish among others is none of its business."""
    log.write("a", {"name": 5}, 1)
    with closing(Wake()) as wake, pytest.raises(BadBuildError, match="named of the read model m is empty: of t 1"):
        a_model(store, Follow("t", Columns(NAMED, {"name": "name"}))).run(wake, until_ready=True)
    log.write("b", {"name": "n"}, 2)
    with closing(Wake()) as wake:
        assert a_model(store, Follow("t", Columns(NAMED, {"name": "name"}))).run(wake, until_ready=True)


def test_tables_that_another_name_has_filled_are_made_anew(log: Log, store: SqliteStore) -> None:
    """What was deleted between the two would stay."""
    log.write("a", {"n": 1}, 1)
    log.write("gone", {"n": 1}, 2)
    with closing(Wake()) as wake:
        assert a_model(store).run(wake, until_ready=True)
    log.records = {place: [] for place in log.records}
    log.write("a", {"n": 1}, 3)
    renamed = ReadModel("renamed", store, [FOLLOW], bootstrap="none", check_seconds=0.001)
    with closing(Wake()) as wake:
        assert renamed.run(wake, until_ready=True)
    assert copied(store) == {"a": {"n": 1}}
    refusing = ReadModel("third", store, [FOLLOW], bootstrap="none", check_seconds=0.001, on_mapping_change="refuse")
    with closing(Wake()) as wake, pytest.raises(NeedsRebuildError, match="copied has rows that it has not written"):
        refusing.run(wake)


def test_what_is_parked_is_not_tried_by_a_mapping_that_did_not_make_the_rows(log: Log, store: SqliteStore) -> None:
    """They would be of two mappings; the rebuild tries them."""
    log.write("k", {"name": "n", "size": 1}, 1)
    with closing(Wake()) as wake:
        assert a_model(store, Follow("t", Columns(NAMED, {"name": "name"}))).run(wake, until_ready=True)
    mended = a_model(store, Follow("t", Columns(NAMED, {"name": "name", "size": "size"})))
    assert (mended.status().same_mapping, mended.status().own_rebuild) == (False, True)
    with pytest.raises(NeedsRebuildError, match="made by another mapping"):
        mended.retry()


def test_the_copy_is_known_as_soon_as_the_block_begins(log: Log, store: SqliteStore) -> None:
    """Whether it may be served; without Kafka."""
    log.write("k", {}, 1)
    with closing(Wake()) as wake:
        assert a_model(store).run(wake, until_ready=True)
    log.away = BrokerUnavailableError("Kafka does not answer.")
    with a_model(store).running() as running:
        assert running.loaded


def test_until_ready_means_rebuilt_where_that_was_asked_for_and_once(
    log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """By a mapping that is another one; the rows are those of the new one when it ends."""
    caplog.set_level("INFO", "outbox.read_model")
    for n in range(5):
        log.write(f"k{n}", {"name": "n", "size": n}, n + 1)
    wake = Wake()
    assert a_model(store, Follow("t", Columns(NAMED, {"name": "name"}))).run(wake, until_ready=True)
    both = Follow("t", Columns(NAMED, {"name": "name", "size": "size"}))
    assert a_model(store, both).run(wake, until_ready=True)
    wake.close()
    assert {row["size"] for _, row in store.rows(both)} == set(range(5))
    assert (len(said(caplog, "read_model.rebuilding")), store.facts().rebuild) == (1, None)


def test_until_ready_that_is_ended_before_says_so(log: Log, store: SqliteStore) -> None:
    """Also when the old copy was ready long ago, and a rebuild is under way."""
    log.write("k", {"name": "n", "size": 1}, 1)
    name = Follow("t", Columns(NAMED, {"name": "name"}))
    with closing(Wake()) as wake:
        assert a_model(store, name).run(wake, until_ready=True)
    both = a_model(store, Follow("t", Columns(NAMED, {"name": "name", "size": "size"})))
    with closing(Wake()) as wake, store.builder() as mine:
        assert mine  # so that the rebuild waits
        ended: list[bool] = []
        thread = threading.Thread(target=lambda: ended.append(both.run(wake, until_ready=True)))
        thread.start()
        eventually(lambda: store.facts().rebuild is not None)
        wake.set()
        thread.join()
    assert ended == [False]


def test_a_topic_made_anew_that_is_empty_takes_nothing_away(
    log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Its owner has yet to fill it: what is served stays until then."""
    caplog.set_level("INFO", "outbox.read_model")
    log.write("k", {"old": 1}, 1)
    with a_model(store).running() as running:
        running.wait_ready(30)
        log.records = {place: [] for place in log.records}
        log.ids = {"t": "another"}
        eventually(lambda: said(caplog, "read_model.rebuild_failed"))
        assert "has nothing for it" in said(caplog, "read_model.rebuild_failed")[0]["error"]
        assert copied(store) == {"k": {"old": 1}}
    log.write("k", {"new": 1}, 1)
    with closing(Wake()) as wake:
        assert a_model(store).run(wake, until_ready=True)
    assert copied(store) == {"k": {"new": 1}}


def test_a_person_may_empty_a_table(log: Log, store: SqliteStore) -> None:
    """By asking for the rebuild."""
    log.write("k", {"old": 1}, 1)
    with closing(Wake()) as wake:
        assert a_model(store).run(wake, until_ready=True)
    log.records = {place: [] for place in log.records}
    log.ids = {"t": "another"}
    assert a_model(store).rebuild()
    assert copied(store) == {}


def test_who_lags_for_longer_than_tombstones_are_kept_is_rebuilt_without_a_restart(
    log: Log, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was current once, and has not been since."""
    log.write("k", {}, 1)
    now = dt.datetime.now(dt.UTC)
    made = Consumer(Declared("m", [FOLLOW]), store, Settings("none", check_seconds=0.001), clock=lambda: now)
    made.open()
    steps(made, lambda: made.currency.ready)
    log.write("k", {}, 2)
    monkeypatch.setattr(made._subscription, "fetch", lambda *_: Fetched())
    now += dt.timedelta(hours=25)
    steps(made, lambda: made.rebuild is not None)
    assert "was last read to its end" in (store.facts().rebuild or "")


def test_what_is_away_is_said_once_until_both_answer_again(
    log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with each look; and then that it goes on, once."""
    caplog.set_level("INFO", "outbox.read_model")
    log.away = BrokerUnavailableError("Kafka is away.")
    with a_model(store).running() as running:
        eventually(lambda: said(caplog, "read_model.waiting"))
        time.sleep(0.3)
        log.away = None
        running.wait_ready(10)
        eventually(lambda: said(caplog, "read_model.resumed"))
    assert len(said(caplog, "read_model.waiting")) == len(said(caplog, "read_model.resumed")) == 1


def test_a_write_is_waited_for_from_the_first_moment_on(
    log: Log, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the thread opens the store, and while the store is away."""
    log.write("k", {}, 7)
    tries = 0
    really = store.open

    def slowly(declared: Declared) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailableError("not yet")
        really(declared)

    monkeypatch.setattr(store, "open", slowly)
    with a_model(store).running() as running:
        running.wait_for("t", "k", 7, timeout=10)
    with pytest.raises(ConfigError, match="does not follow"):
        running.wait_for("nothing", "k", 7, timeout=10)


def waits(running: Running) -> tuple[threading.Thread, list[BaseException]]:
    """Somebody who waits for what never comes, without a limit."""
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            running.wait_for("t", "never", 99)
        except OutboxError as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, caught


def test_who_waits_without_a_limit_is_told_when_it_is_stopped(log: Log, store: SqliteStore) -> None:
    """Or it would wait on for ever, and asyncio with it."""
    with a_model(store).running() as running:
        running.wait_ready(10)
        thread, caught = waits(running)
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(caught[0], NotCaughtUpError)
    assert "was stopped" in caught[0].message
    assert not running.ready
    del log


def test_what_is_not_kept_any_more_is_not_ready(log: Log, store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    """An error that stays ends the thread; who waits gets it."""
    caplog.set_level(logging.CRITICAL, "outbox.read_model")
    running = Running(a_model(store))
    running.start()
    running.wait_ready(10)
    thread, caught = waits(running)
    log.away = BrokerError("It is denied for good.")
    eventually(lambda: not running.ready)
    thread.join(10)
    assert "for good" in str(caught[0])
    assert running.loaded
    with pytest.raises(BrokerError, match="for good"):
        running.stop()


def test_an_entry_that_was_parked_is_not_waited_for(log: Log, store: SqliteStore) -> None:
    """Its reason is told; one that was parked before it says nothing."""
    log.write("k", b"rubbish", 7)
    with a_model(store).running() as running:
        running.wait_ready(10)
        for entry_id in (6, 7):
            with pytest.raises(ParkedError, match="cannot be decoded"):
                running.wait_for("t", "k", entry_id, timeout=10)
        with pytest.raises(NotCaughtUpError):
            running.wait_for("t", "k", 8, timeout=0.1)
        log.write("k", {}, 8)
        running.wait_for("t", "k", 8, timeout=10)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"on_outrun": "refused"}, "on_outrun"),
        ({"on_mapping_change": "no"}, "on_mapping_change"),
        ({"batch": 0}, "batch"),
        ({"check_seconds": 0}, "check_seconds"),
        ({"forget_deleted": -1}, "forget_deleted"),
        ({"forget_deleted": math.inf}, "forget_deleted"),
        ({"instance": ""}, "instance"),
        ({"bootstrap": ""}, "bootstrap"),
        ({"kafka": {"group.id": "x"}}, "the read model's name"),
        ({"kafka": {"isolation.level": "read_uncommitted"}}, "isolation.level"),
        ({"kafka": {"auto.offset.reset": "latest"}}, "the store says"),
        ({"kafka": {"enable.auto.commit": "true"}}, "the store says"),
        ({"kafka": {"partition.assignment.strategy": "cooperative-sticky"}}, "by hand"),
        ({"kafka": {"group.protocol": "consumer"}}, "by hand"),
        ({"kafka": {"bootstrap.servers": "x"}}, "set bootstrap="),
        ({"kafka": {"rebalance_cb": "x"}}, "names code"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], why: str) -> None:
    """By name, with a cure."""
    with pytest.raises(ConfigError, match=why) as caught:
        Settings(**{"bootstrap": "x", **settings})
    assert caught.value.cure


def test_what_does_no_harm_is_passed_through() -> None:
    """TLS, times, another way to share partitions."""
    Settings("x", {"security.protocol": "SSL", "partition.assignment.strategy": "roundrobin"})


# -- the subscription ----------------------------------------------------------------------------------------------


class Message:
    """A message of the client's, or an error."""

    def __init__(self, offset: int, error: KafkaError | None = None) -> None:
        self._offset, self._error = offset, error

    def error(self) -> KafkaError | None:
        return self._error

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return 1, 0

    def key(self) -> bytes:
        return b"k"

    value = key

    def headers(self) -> None:
        return None


class Client:
    """A client that gives what a test says."""

    def __init__(self, *batches: Sequence[Message] | Exception) -> None:
        self._batches = list(batches)

    def assign(self, _partitions: object) -> None:
        pass

    def poll(self, _seconds: float) -> Message | None:
        batch = self._batches.pop(0) if self._batches else []
        if isinstance(batch, Exception):
            raise batch
        self._rest = list(batch[1:])
        return batch[0] if batch else None

    def consume(self, _most: int, _seconds: float) -> list[Message]:
        return self._rest

    def close(self) -> None:
        pass


def subscribed(*batches: Sequence[Message] | Exception, instance: str | None = None) -> Subscription:
    """A subscription whose client is another one, which reads partition 0 of t from 3."""
    made = Subscription("127.0.0.1:1", {}, ["t"], group=None, instance=instance)
    made._consumer.close()
    made._consumer = Client(*batches)  # type: ignore[assignment]
    made.begin({HERE: 3})
    return made


def test_records_that_came_before_an_error_are_given_before_it_is_raised() -> None:
    """They would be lost: the client gives them once."""
    error = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    made = subscribed([Message(3), Message(0, error), Message(4)], [Message(5)])
    fetched = made.fetch(10, 0)
    assert ([record.offset for record in fetched.records[HERE]], fetched.since) == ([3, 4], {HERE: 3})
    with pytest.raises(BrokerError):
        made.fetch(10, 0)
    fetched = made.fetch(10, 0)
    assert ([record.offset for record in fetched.records[HERE]], fetched.since) == ([5], {HERE: 5})


def test_an_error_that_comes_alone_is_raised_at_once() -> None:
    """From a message, or from the call."""
    error = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    with pytest.raises(BrokerError):
        subscribed([Message(0, error)]).fetch(10, 0)
    with pytest.raises(BrokerError):
        subscribed(KafkaException(error)).fetch(10, 0)


def test_a_topic_that_is_missing_is_no_error_of_a_fetch() -> None:
    """The others are read."""
    made = subscribed([Message(0, KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)), Message(3)])
    assert len(made.fetch(10, 0)) == 1


@pytest.mark.parametrize("code", [KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID])
def test_a_member_whose_name_another_one_has_taken_ends(code: int) -> None:
    """It gets nothing any more: to wait would be to hang."""
    made = subscribed([Message(0, KafkaError(code))], instance="a")
    with pytest.raises(BrokerError, match='instance name "a"') as caught:
        made.fetch(10, 0)
    assert not consumer.is_passing(caught.value)
    assert "instance=" in caught.value.cure


# -- reconcile -----------------------------------------------------------------------------------------------------


def test_what_a_type_rounds_is_equal_and_of_a_key_in_two_partitions_the_greater_id_counts(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is read last; what comes from no entry counts as it comes."""
    log = Log("t", partitions=2)
    into = Columns(TYPED, {"at": "at", "local": "at", "price": "price", "single": "single"})
    declared = Declared("typed", [Follow("t", into)])
    store.create(declared)
    store.open(declared)
    moved = {"at": "2026-01-02T14:00:00+02:00", "price": 1.5, "single": 0.1}
    log.write("moved", moved, 9, partition=0)
    log.write("moved", {"price": 7}, 8, partition=1)
    log.write("repaired", {"price": 1}, 5, partition=0)
    log.write("repaired", {"price": 2}, 0, partition=1)
    log.write("gone", {"price": 2}, 5, partition=1)
    log.write("gone", None, 6, partition=1)
    with store.transaction() as transaction:
        claims: dict[Place, Claim] = {place: transaction.claim(place) for place in log.records}
    fetched = Fetched({place: list(there) for place, there in log.records.items()}, dict.fromkeys(claims, 9))
    Applier(declared, store).apply(fetched, claims)
    with store.engine.begin() as connection:
        # As a server keeps it that has single precision.
        connection.execute(TYPED.update().values(single=0.10000000149011612).where(TYPED.c.key == "moved"))
    ends = {place.partition: len(there) for place, there in log.records.items()}
    monkeypatch.setattr(reader, "bounds", lambda *_: (dict.fromkeys(ends, 0), ends))
    everything = [record for there in log.records.values() for record in there]
    asked: list[int] = []

    def read_between(*_: object) -> list[Record]:
        asked.append(1)
        return everything if len(asked) == 1 else []

    monkeypatch.setattr(reader, "read_between", read_between)
    with comparison() as found:
        report = Comparer(declared, store, Settings("none"), declared.follows[0], seconds=1).run(found)
    assert (report.equal, report.different, report.examples) == (2, 0, {})
