"""Reconcile: whether a type's topic says what its source says, key by key, while both change.

1. The topic is read to its end as it is now.
2. The source is read as of one snapshot, taken after that.
3. It is waited until everything that the snapshot sees is published; what the topic got meanwhile is read as well.

Then a key whose last record is not what the source says differs for good - unless the topic got a record of it in step
3, which may be newer than the snapshot. Such keys are looked at again, by 2 and 3, a few times; one that never holds
still cannot be told. What is compared lies in a file, as digests: memory does not grow with the keys.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import psycopg

from outbox.canonical import digest
from outbox.config import Config
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.equality import Equality
from outbox.errors import ConfigError, NoRelayError
from outbox.kafka import reader
from outbox.kafka.reader import Record
from outbox.kafka.shard_log import read_positions
from outbox.message import CONTENT_TYPE_HEADER
from outbox.position import Position
from outbox.sample import Sample
from outbox.schema import quote
from outbox.source import Source, look, run_under

KINDS = ("missing", "stale", "orphaned", "undecodable")
"""A key of the source without a live record; one whose record says something else; a live record without a row; a
record that cannot be read as what it says it is."""
_ROWS_AT_ONCE = 2_000
_KEYS_AT_ONCE = 1_000
_LOOKS = 6
_EXAMPLES = 20

Progress = Callable[[str, int, int | None], None]
"""Told what is read (`topic`, `source`, `again`), how much of it, and of how much (None: not known)."""


@dataclass
class Report:
    """Counts of keys; `examples` are the first of each kind that differs, `moving` those that never held still."""

    equal: int = 0
    missing: int = 0
    stale: int = 0
    orphaned: int = 0
    undecodable: int = 0
    moving: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def different(self) -> int:
        """How many keys differ."""
        return self.missing + self.stale + self.orphaned + self.undecodable

    @property
    def keys(self) -> int:
        """How many were compared."""
        return self.equal + self.different + self.moving


class Comparison:
    """Two sides of a topic, as digests, in a file of its own.

    `topic` has of each key the last record: digests of its value and of its bytes (both null: a tombstone; where it has
    a value, that stands for both), whether it is compared by value (JSON, unless its type says otherwise), and in which
    look it came. `source` has of each key the digests of its state.
    """

    def __init__(self, directory: Path, equality: Equality) -> None:
        self._equality = equality
        # By content type: there are a few.
        self._valued: dict[bytes | None, bool] = {}
        self._database = sqlite3.connect(directory / "reconcile.sqlite", isolation_level=None)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
            CREATE TABLE records (place INTEGER PRIMARY KEY, key TEXT, value BLOB, bytes BLOB, valued INT, look INT);
            CREATE TABLE rows (key TEXT, value BLOB, bytes BLOB);
            CREATE TABLE topic (key TEXT PRIMARY KEY, value BLOB, bytes BLOB, valued INT, look INT) WITHOUT ROWID;
            CREATE TABLE source (key TEXT PRIMARY KEY, value BLOB, bytes BLOB) WITHOUT ROWID;
            CREATE TABLE again (key TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE found (key TEXT PRIMARY KEY, kind TEXT) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def empty(self) -> None:
        """Begin anew."""
        for table in ("records", "rows", "topic", "source", "again", "found"):
            self._database.execute(f"DELETE FROM {table}")

    def take_records(self, records: Iterable[Record], look: int) -> None:
        """Take in records of the topic, in order for each key."""
        self._fill("INSERT INTO records (key, value, bytes, valued, look) VALUES (?, ?, ?, ?, ?)",
                   (self._of_record(record, look) for record in records))  # fmt: skip
        # The greatest place is the last record; SQLite takes the other columns of that row. Sorted, so that a table of
        # millions is written from its beginning to its end.
        self._database.executescript(
            """
            INSERT OR REPLACE INTO topic SELECT key, value, bytes, valued, look FROM
                (SELECT key, value, bytes, valued, look, max(place) FROM records GROUP BY key ORDER BY key);
            DELETE FROM records;
            """
        )

    def take_rows(self, rows: Iterable[tuple[str, bytes | None]], *, of: Sequence[str] | None = None) -> None:
        """Take in rows of the source; `of`: they are all that there are of these keys."""
        if of is not None:
            self._fill("DELETE FROM source WHERE key = ?", ((key,) for key in of))
        value = self._equality.value
        made = ((key, None if state is None else value(state), digest(state or b"")) for key, state in rows)
        self._fill("INSERT INTO rows (key, value, bytes) VALUES (?, ?, ?)", made)
        self._database.executescript(
            "INSERT OR REPLACE INTO source SELECT key, value, bytes FROM rows ORDER BY key; DELETE FROM rows;"
        )

    def _fill(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._database.execute("BEGIN")
        taken = iter(rows)
        while some := list(islice(taken, _ROWS_AT_ONCE)):
            self._database.executemany(statement, some)
        self._database.execute("COMMIT")

    def _of_record(self, record: Record, look: int) -> tuple[object, ...]:
        key = (record.key or b"").decode(errors="replace")
        if record.value is None:
            return key, None, None, 1, look
        said = next((value for name, value in record.headers if name == CONTENT_TYPE_HEADER), None)
        valued = self._valued.get(said)
        if valued is None:
            valued = self._equality.by_value(None if said is None else said.decode(errors="replace"))
            self._valued[said] = valued
        value = self._equality.value(record.value) if valued else None
        # Of the bytes only that there are some counts where there is a value.
        return key, value, digest(record.value) if value is None else value, int(valued), look

    def compare(self, look: int, *, everything: bool) -> None:
        """Compare all keys, or those to be looked at again; which of them are to be looked at once more."""
        among = "" if everything else " AND key IN (SELECT key FROM again)"
        self._database.executescript(
            f"""
            DELETE FROM found WHERE 1{among};
            INSERT OR REPLACE INTO found
            SELECT key, CASE WHEN t.key IS NULL OR t.bytes IS NULL THEN 'missing'
                             WHEN t.valued AND t.value IS NULL THEN 'undecodable' ELSE 'stale' END
            FROM source s LEFT JOIN topic t USING (key)
            WHERE (t.bytes IS NULL OR CASE WHEN t.valued THEN t.value IS NOT s.value OR t.value IS NULL
                                           ELSE t.bytes IS NOT s.bytes END){among}
            UNION ALL
            SELECT key, CASE WHEN t.valued AND t.value IS NULL THEN 'undecodable' ELSE 'orphaned' END
            FROM topic t WHERE t.bytes IS NOT NULL AND NOT EXISTS (SELECT 1 FROM source s WHERE s.key = t.key){among};
            DELETE FROM again;
            INSERT INTO again SELECT f.key FROM found f JOIN topic t USING (key) WHERE t.look = {look:d};
            """
        )

    def again(self) -> Iterator[list[str]]:
        """The keys to be looked at again, some at a time."""
        last = ""
        while True:
            rows = self._database.execute(
                "SELECT key FROM again WHERE key > ? ORDER BY key LIMIT ?", [last, _KEYS_AT_ONCE]
            ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [row[0] for row in rows]

    def different(self) -> Iterator[list[str]]:
        """The keys that differ, some at a time; without those that could not be told."""
        cursor = self._database.execute("SELECT key FROM found WHERE key NOT IN (SELECT key FROM again) ORDER BY key")
        while rows := cursor.fetchmany(_KEYS_AT_ONCE):
            yield [row[0] for row in rows]

    def report(self) -> Report:
        """What was found."""
        report = Report()
        settled = "FROM found WHERE key NOT IN (SELECT key FROM again)"
        for kind, count in self._database.execute(f"SELECT kind, count(*) {settled} GROUP BY kind"):
            setattr(report, kind, count)
            rows = self._database.execute(f"SELECT key {settled} AND kind = ? ORDER BY key LIMIT ?", [kind, _EXAMPLES])
            report.examples[kind] = [row[0] for row in rows]
        (report.moving,) = self._database.execute("SELECT count(*) FROM again").fetchone()
        (there,) = self._database.execute(
            "SELECT (SELECT count(*) FROM source) + (SELECT count(*) FROM topic t WHERE t.bytes IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM source s WHERE s.key = t.key))"
        ).fetchone()
        report.equal = there - report.different - report.moving
        return report


class Reconciler:
    """Compares one entity type; `comparison` holds what was found."""

    def __init__(
        self,
        config: Config,
        connection: Connection,
        entity_type: EntityType,
        *,
        name: str,
        shards: int,
        told: Progress = lambda _what, _done, _of: None,
        seconds: float = 60.0,
        sample: int | None = None,
    ) -> None:
        """`seconds`: how long the relay may take to publish what a snapshot sees; `sample`: about so many keys."""
        if entity_type.source is None:
            raise ConfigError(
                f'The entity type "{entity_type.name}" has no source to compare its topic with.',
                cure=f"Name it: outbox types change {entity_type.name} --source 'SELECT ...'.",
            )
        self._config = config
        self._connection = connection
        self._type = entity_type
        self._name = name
        self._shards = shards
        self._told = told
        self._seconds = seconds
        self._source: Source = look(connection, entity_type.name, entity_type.source)
        self._ends: dict[int, int] = {}
        self.sample = Sample.of(sample, total=self._count()) if sample is not None else None

    def _count(self) -> int:
        with self._connection.transaction():
            self._connection.execute("SET LOCAL statement_timeout = 0")
            run_under(self._connection, derived=self._type.derived)
            row = self._connection.execute(self._source.count().encode(), {}).fetchone()
        return int(row[0]) if row else 0

    def run(self, comparison: Comparison) -> Report:
        """Compare, from the start."""
        comparison.empty()
        self._ends = {}
        comparison.take_records(self._records(), 0)
        for look_number in range(1, _LOOKS + 1):
            first = look_number == 1
            with self._snapshot() as snapshot:
                if first:
                    comparison.take_rows(self._rows())
                else:
                    for keys in comparison.again():
                        comparison.take_rows(self._rows_of(keys), of=keys)
            self._wait_published(snapshot)
            self._wait_marked()
            comparison.take_records(self._records(), look_number)
            comparison.compare(look_number, everything=first)
            if next(comparison.again(), None) is None:
                break
        return comparison.report()

    # -- the topic ---------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[Record]:
        """What the topic got since it was read last, to its end as it is now."""
        servers = (self._config.kafka_bootstrap_servers, self._config.kafka)
        starts, ends = reader.bounds(*servers, self._type.topic)
        starts = {partition: self._ends.get(partition, start) for partition, start in starts.items()}
        self._ends = dict(ends)
        total = sum(ends[partition] - start for partition, start in starts.items())
        for number, record in enumerate(reader.read_between(*servers, self._type.topic, starts, ends)):
            if number % _ROWS_AT_ONCE == 0:
                self._told("topic", number, total)
            if self.sample is None or self.sample.takes(record.key or b""):
                yield record

    # -- the source --------------------------------------------------------------------------------------------

    @contextmanager
    def _snapshot(self) -> Iterator[str]:
        """A transaction in which the source is read as of one snapshot, which is given."""
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            self._connection.execute("SET LOCAL statement_timeout = 0")
            run_under(self._connection, derived=self._type.derived)
            row = self._connection.execute("SELECT pg_current_snapshot()::text").fetchone()
            try:
                yield str(row[0]) if row else ""
            except psycopg.DataError as error:
                raise ConfigError(
                    f'The source of "{self._type.name}" cannot be read: {error.diag.message_primary or error}.',
                    cure="See which row it is: outbox backfill start names it.",
                ) from error

    def _rows(self) -> Iterator[tuple[str, bytes | None]]:
        # A row without a key is no entity: outbox backfill start tells of it.
        with self._connection.cursor() as cursor:
            query = self._source.every(of=self.sample.sql if self.sample is not None else None)
            rows = cursor.stream(query.encode(), {}, binary=True, size=_ROWS_AT_ONCE)
            for number, (key, state, *_) in enumerate(rows):
                if number % _ROWS_AT_ONCE == 0:
                    self._told("source", number, None)
                if key is None:
                    raise ConfigError(
                        f'The source of "{self._type.name}" has rows without a key.',
                        cure="See: outbox backfill start --dry-run.",
                    )
                yield key, state

    def _rows_of(self, keys: Sequence[str]) -> list[tuple[str, bytes | None]]:
        given = self._source.looked_up(keys)
        if given is None:
            return [row for key in keys if self._source.looked_up([key]) for row in self._rows_of([key])]
        self._told("again", len(keys), None)
        try:
            with self._connection.transaction(), self._connection.cursor(binary=True) as cursor:
                found = cursor.execute(self._source.rows_of().encode(), given).fetchall()
        except psycopg.DataError:
            if len(keys) == 1:
                return []  # no row has a key that its columns cannot hold
            return [row for key in keys for row in self._rows_of([key])]
        return [(key, state) for key, state, *_ in found]

    # -- in between --------------------------------------------------------------------------------------------

    def _wait_published(self, snapshot: str) -> None:
        """Wait until everything that a snapshot sees is published; `NoRelayError` when that takes too long."""
        deadline = time.monotonic() + self._seconds
        behind: Sequence[int] = range(self._shards)
        while True:
            values = read_positions(self._config, self._name)
            # What is published once stays so: only the others are looked at again.
            behind = [shard for shard in behind if not self._published(shard, values[shard], snapshot)]
            if not behind:
                return
            if time.monotonic() > deadline:
                raise NoRelayError(
                    f"Shard {behind[0]} of {self._name} has not published in {self._seconds:g} s what was committed by "
                    "then.",
                    cure="See outbox status: does a relay run, and how far is it?",
                )
            time.sleep(0.1)

    def _wait_marked(self) -> None:
        """Wait until all that the topic has now is marked: Kafka marks a transaction partition by partition.

        The position's partition may be marked before the state's, whose end is then before what is published.
        """
        deadline = time.monotonic() + self._seconds
        servers = (self._config.kafka_bootstrap_servers, self._config.kafka)
        written = reader.written(*servers, self._type.topic)
        while any(end < written[partition] for partition, end in reader.bounds(*servers, self._type.topic)[1].items()):
            if time.monotonic() > deadline:
                raise NoRelayError(
                    f"A transaction in {self._type.topic} has been open for {self._seconds:g} s.",
                    cure="See who writes to it: kafka-transactions.sh find-hanging.",
                )
            time.sleep(0.05)

    def _published(self, shard: int, value: bytes | None, snapshot: str) -> bool:
        position = Position.decode(value) if value is not None else None
        point = position.point if position is not None else None
        if position is None or point is None or position.cut is not None or point.snapshot is None:
            # From the start, or within a backlog: published is what is not there at all.
            return position is not None and not self._exists("e.shard = %(shard)s::smallint", shard=shard, s=snapshot)
        return not any(
            self._exists(f"e.shard = %(shard)s::smallint AND {where}", **given, shard=shard, s=snapshot)
            for where, given in (
                ("e.xid >= %(xmax)s::text::xid8", {"xmax": str(point.snapshot.xmax)}),
                ("e.xid = ANY (%(xip)s::text::xid8[])", {"xip": "{" + ",".join(map(str, point.xip)) + "}"}),
                ("e.id > %(floor)s::bigint", {"floor": point.floor}),
            )
        )

    def _exists(self, where: str, **given: object) -> bool:
        row = self._connection.execute(
            f"SELECT EXISTS (SELECT FROM {quote(self._config.schema)}.entries e WHERE {where}"
            " AND pg_visible_in_snapshot(e.xid, %(s)s::pg_snapshot))".encode(),
            given,
        ).fetchone()
        return bool(row and row[0])


@contextmanager
def comparison(equality: Equality | None = None) -> Iterator[Comparison]:
    """An empty comparison, in a directory that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="outbox-reconcile-") as directory,
        closing(Comparison(Path(directory), equality or Equality())) as made,
    ):
        yield made
