"""Reading by position: every entry once, each key in order; the simpler readers that do not manage it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Self

import orjson
import psycopg
import pytest

from devstack.postgres import Postgres
from outbox import schema
from outbox.config import Config
from outbox.entry import Entry
from outbox.position import Position, start
from outbox.reader import Reader
from workload import Seen, Writers, committed_ids, judge, make_domain

pytestmark = pytest.mark.postgres


def seen(entry: Entry) -> Seen:
    """What a published entry shows."""
    return Seen(entry[0], entry[2], orjson.loads(entry[3])["version"] if entry[3] is not None else None)


class Trial(ABC):
    """One way to read the outbox; each call reads the next batch."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @property
    def cut(self) -> bool:
        """Whether the difference that is being read goes on."""
        return False

    @abstractmethod
    def __call__(self) -> list[Seen]:
        """The next batch."""


class ByPosition(Trial):
    """The reader that the relay uses, in batches so small that most are cut."""

    def __init__(self, url: str, *, batch_rows: int = 40) -> None:
        super().__init__(url)
        self.reader = Reader(Config(database_url=url, batch_rows=batch_rows), shard=0)
        identity = self.reader.open()
        self.position: Position = start(identity.name, 0, "t", 1, identity.system, 1, 0)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.reader.close()

    @property
    def cut(self) -> bool:
        return self.position.cut is not None

    def __call__(self) -> list[Seen]:
        batch = self.reader.read(self.position)
        self.position = batch.next()
        # As the relay does after a crash: what it knows is what the record says.
        self.position = Position.decode(self.position.encode())
        return [seen(entry) for entry in batch.entries]


class ByGreatestId(Trial):
    """Wrong: `id > last`. What commits late with a smaller id is never read."""

    query = "SELECT id, key, state FROM outbox.entries WHERE id > %s ORDER BY id LIMIT 40"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.last = 0

    def __call__(self) -> list[Seen]:
        rows = self.connection.execute(self.query, [self.last]).fetchall()
        if rows:
            self.last = rows[-1][0]
        return [Seen(i, key, orjson.loads(state)["version"]) for i, key, state in rows]


class ByXidBelowHorizon(Trial):
    """Wrong: in the order of xids, below the oldest running transaction. An early xid may hold the newer state."""

    query = """SELECT xid::text, id, key, state FROM outbox.entries
               WHERE (xid, id) > (%s::text::xid8, %s) AND xid < pg_snapshot_xmin(pg_current_snapshot())
               ORDER BY xid, id LIMIT 40"""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.last = ("0", 0)

    def __call__(self) -> list[Seen]:
        rows = self.connection.execute(self.query, self.last).fetchall()
        if rows:
            self.last = rows[-1][:2]
        return [Seen(i, key, orjson.loads(state)["version"]) for _, i, key, state in rows]


class ByPositionCutByXid(Trial):
    """Wrong: the difference of two snapshots, but a large one cut by xid instead of by id."""

    query = """SELECT xid::text, id, key, state FROM outbox.entries
               WHERE (NOT pg_visible_in_snapshot(xid, %s::pg_snapshot))
                 AND pg_visible_in_snapshot(xid, %s::pg_snapshot) AND (xid, id) > (%s::text::xid8, %s)
               ORDER BY xid, id LIMIT 40"""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.at = "1:1:"
        self.to: str | None = None
        self.last = ("0", 0)

    def __call__(self) -> list[Seen]:
        if self.to is None:
            row = self.connection.execute("SELECT pg_current_snapshot()::text").fetchone()
            assert row is not None
            self.to = row[0]
        rows = self.connection.execute(self.query, (self.at, self.to, *self.last)).fetchall()
        if len(rows) < 40:
            self.at, self.to, self.last = self.to, None, ("0", 0)
        else:
            self.last = rows[-1][:2]
        return [Seen(i, key, orjson.loads(state)["version"]) for _, i, key, state in rows]


READERS: dict[str, type[Trial]] = {
    "by position": ByPosition,
    "by greatest id": ByGreatestId,
    "by xid below the horizon": ByXidBelowHorizon,
    "by position, cut by xid": ByPositionCutByXid,
}


@pytest.fixture
def things(outbox_database: str) -> str:
    """A database with things, of which twenty are changed all the time."""
    make_domain(outbox_database, 20)
    return outbox_database


def test_twelve_writers_every_entry_once_each_key_in_order_and_three_wrong_readers_fail(things: str) -> None:
    """Design: commit order is neither id order nor xid order; a snapshot and an anchor tell what is new."""
    results: dict[str, list[Seen]] = {}
    errors: list[BaseException] = []
    over = threading.Event()

    def read(name: str) -> None:
        try:
            found: list[Seen] = []
            with READERS[name](things) as reader:
                while True:
                    last_look = over.is_set()
                    batch = reader()
                    found += batch
                    if last_look and not batch and not reader.cut:
                        break
            results[name] = found
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=read, args=(name,)) for name in READERS]
    with Writers(things, keys=20, count=12, transactions=120) as writers:
        for thread in threads:
            thread.start()
        writers.join()
        over.set()
        for thread in threads:
            thread.join(120)
    assert not errors
    committed = committed_ids(things)
    assert len(committed) > 1000
    judgements = {name: judge(committed, found) for name, found in results.items()}

    assert judgements["by position"].right, judgements["by position"]
    with psycopg.connect(things) as connection:
        table: dict[str, int] = dict(connection.execute("SELECT key, version FROM thing WHERE version > 0").fetchall())
    assert {one.key: one.version for one in results["by position"]} == table

    assert judgements["by greatest id"].lost
    assert not judgements["by xid below the horizon"].lost
    assert judgements["by xid below the horizon"].stale
    assert judgements["by position, cut by xid"].stale


def put(connection: psycopg.Connection, key: str, version: int) -> None:
    """Insert an entry, as any writer does."""
    connection.execute(
        "INSERT INTO outbox.entries (type, key, state) VALUES ('thing', %s, %s)",
        [key, orjson.dumps({"version": version})],
    )


def test_an_open_transaction_delays_only_its_own_entries(things: str) -> None:
    """However long it stays open, with a smaller id and a smaller xid than everything that commits."""
    with ByPosition(things) as reader, psycopg.connect(things) as open_one, psycopg.connect(things) as other:
        put(open_one, "k1", 1)
        for version in range(1, 6):
            put(other, "k2", version)
            other.commit()
            assert [(s.key, s.version) for s in reader()] == [("k2", version)]
        open_one.commit()
        assert [(s.key, s.version) for s in reader()] == [("k1", 1)]
        assert reader() == []


def test_a_cut_backlog_goes_up_to_a_fixed_point_and_then_on(things: str) -> None:
    """What commits while the backlog is read comes after it, also with a smaller id."""
    with ByPosition(things) as reader, psycopg.connect(things) as late, psycopg.connect(things) as other:
        put(late, "k1", 1)
        for version in range(1, 101):
            put(other, "k2", version)
        other.commit()
        first = reader()
        assert reader.position.cut is not None
        late.commit()
        put(other, "k3", 1)
        other.commit()
        rest = [one for _ in range(6) for one in reader()]
        assert [s.version for s in first + rest if s.key == "k2"] == list(range(1, 101))
        assert [s.key for s in (first + rest)[100:]] == ["k1", "k3"]
    assert judge(committed_ids(things), first + rest).right


def batches(reader: Reader) -> Iterator[Sequence[Entry]]:
    """The entries of each batch, from the start of the log to the end of its backlog."""
    identity = reader.open()
    position = start(identity.name, 0, "t", 1, identity.system, 1, 0)
    while True:
        batch = reader.read(position)
        yield batch.entries
        if not batch.cut:
            return
        position = batch.next()


def test_a_batch_ends_at_its_limit_in_bytes_but_holds_at_least_one_entry(things: str) -> None:
    """Memory is bounded by configuration, not by what services write."""
    with psycopg.connect(things) as writer:
        for number in range(6):
            writer.execute(
                "INSERT INTO outbox.entries (type, key, state) VALUES ('thing', %s, %s)", [f"k{number}", b"x" * 400_000]
            )
    with closing(Reader(Config(database_url=things, batch_bytes=1_000_000), shard=0)) as reader:
        # The server's own cut takes the one that goes over it; what is streamed is as much as is likely to fit.
        assert [len(entries) for entries in batches(reader)] == [3, 2, 1]
    with closing(Reader(Config(database_url=things, batch_bytes=1), shard=0)) as reader:
        assert len(next(batches(reader))) == 1


def test_a_streamed_batch_keeps_to_the_limit_and_hardly_ever_gives_up_a_query(things: str, postgres: Postgres) -> None:
    """The batches of a backlog are cut by the reader; a query that it gives up is one that the server cancels and logs.

    It asks for as many as would fill a batch like the one before: where small states become large it errs in the batch
    in which they do, and in the next, which comes after a mixed one.
    """
    with psycopg.connect(things) as writer:
        writer.execute(
            "INSERT INTO outbox.entries (type, key, state, headers)"
            " SELECT 'thing', 'k' || n, CASE WHEN n % 50 > 0 THEN convert_to(repeat('x', size), 'UTF8') END,"
            "        CASE WHEN n % 50 = 0 THEN jsonb_build_object('h', repeat('y', size)) END"
            " FROM generate_series(1, 700) n, LATERAL (SELECT CASE WHEN n <= 500 THEN 5000 ELSE 50000 END AS size) s"
        )
    logged = postgres.log.stat().st_size
    with closing(Reader(Config(database_url=things, batch_bytes=1_000_000), shard=0)) as reader:
        found = list(batches(reader))
    ids = [entry[0] for entries in found for entry in entries]
    assert ids == sorted(set(ids))
    assert len(ids) == 700
    sizes = [
        [256 + len(entry[2]) + len(entry[3] or b"") + len(entry[7] or "") for entry in entries] for entries in found
    ]
    assert max(sum(of_one[:-1]) for of_one in sizes) < 1_000_000
    # Nor are they small: as few as a limit that is nearly met allows.
    assert len(found) <= sum(map(sum, sizes)) / 1_000_000 / 0.9 + 3
    with postgres.log.open("rb") as log:
        log.seek(logged)
        assert log.read().count(b"canceling statement due to user request") <= 2


def test_a_server_that_counts_bytes_for_characters_cuts_where_the_reader_knows_it(postgres: Postgres) -> None:
    """In a database without an encoding the server's sum is greater than ours: what it left out must not be skipped."""
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'")
    url = postgres.url("bytes")
    try:
        with psycopg.connect(url, client_encoding="UTF8") as writer:
            schema.install(writer, schema.Settings(name="bytes"))
            writer.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('thing', 'thing')")
            writer.execute(
                "INSERT INTO outbox.entries (type, key, state)"
                " SELECT 'thing', repeat('ключ', 50) || n, '{}' FROM generate_series(1, 100) n"
            )
        with closing(Reader(Config(database_url=url, batch_bytes=50_000), shard=0)) as reader:
            first, *others = batches(reader)
        # Ours, of characters, stays below the limit.
        assert sum(256 + len(entry[2]) + 2 for entry in first) < 50_000
        assert len(first) < 100
        keys = {entry[2] for entries in (first, *others) for entry in entries}
        assert len(keys) == 100
    finally:
        with psycopg.connect(postgres.url(), autocommit=True) as admin:
            admin.execute("DROP DATABASE bytes WITH (FORCE)")


def test_xids_handed_out_again_do_not_hide_an_entry(things: str) -> None:
    """After a crash an entry may bear an xid that the position's snapshot counts as published; its id is greater."""
    with ByPosition(things) as reader, psycopg.connect(things) as writer:
        put(writer, "k1", 1)
        writer.commit()
        assert len(reader()) == 1
        point = reader.position.point
        assert point.snapshot is not None
        # The same as a crash makes: the snapshot lies ahead of the transaction ids that the server hands out.
        ahead = replace(point.snapshot, xmin=point.snapshot.xmax + 1000, xmax=point.snapshot.xmax + 1000, xip=())
        reader.position = replace(reader.position, point=replace(point, snapshot=ahead))
        put(writer, "k1", 2)
        writer.commit()
        assert [s.version for s in reader()] == [2]
