"""Reconcile: whether a type's topic says what its source says, key by key, while both change.

1. The topic is read to its end as it is now.
2. The source is read as of one snapshot, taken after that end was; both are read at the same time.
3. It is waited until everything that the snapshot sees is published; what the topic got meanwhile is read as well.

Then a key whose last record is not what the source says differs for good - unless the topic got a record of it in step
3, which may be newer than the snapshot. Such keys are looked at again, by 2 and 3, a few times; one that never holds
still cannot be told. What is compared lies in a file, as digests: memory does not grow with the keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

import psycopg

from outbox.comparison import Comparison, Report
from outbox.config import Config
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.errors import ConfigError, NoRelayError
from outbox.kafka import reader
from outbox.kafka.shard_log import read_positions
from outbox.position import Position
from outbox.sample import Sample
from outbox.schema import quote
from outbox.source import Source, look, run_under
from outbox.topic_side import ROWS_AT_ONCE, Reading, beside

_LOOKS = 6

Progress = Callable[[str, int, int | None], None]
"""Told what is read (`topic`, `source`, `again`), how much of it, and of how much (None: not known)."""


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
        for look_number in range(1, _LOOKS + 1):
            first = look_number == 1
            snapshot = self._read_all(comparison) if first else self._read_again(comparison)
            self._wait_published(snapshot)
            self._wait_marked()
            reading = self._reading()
            comparison.take_records(reading.records(partial(self._tell_topic, reading)), look_number)
            comparison.compare(look_number, everything=first)
            if next(comparison.again(), None) is None:
                break
        return comparison.report()

    def _read_all(self, comparison: Comparison) -> str:
        """Read both sides; the snapshot as of which the source was read."""
        # Its end, before the snapshot is taken.
        reading = self._reading()
        told = partial(self._tell_topic, reading)
        with beside(comparison.topic_path, comparison.equality, reading, told) as topic:
            # What is not read to its end is closed first: it holds the connection, which the transaction's end needs.
            with self._snapshot() as snapshot, closing(self._rows(topic.look)) as rows:
                comparison.take_rows(rows)
            topic.wait()
        return snapshot

    def _read_again(self, comparison: Comparison) -> str:
        """Read those rows of the source that are to be looked at again."""
        with self._snapshot() as snapshot:
            for keys in comparison.again():
                comparison.take_rows(self._rows_of(keys), of=keys)
        return snapshot

    # -- the topic ---------------------------------------------------------------------------------------------

    def _reading(self) -> Reading:
        """What the topic got since it was read last, to its end as it is now."""
        servers = (self._config.kafka_bootstrap_servers, self._config.kafka)
        starts, ends = reader.bounds(*servers, self._type.topic)
        starts = {partition: self._ends.get(partition, start) for partition, start in starts.items()}
        self._ends = dict(ends)
        return Reading(*servers, self._type.topic, starts, ends, self.sample)

    def _tell_topic(self, reading: Reading, read: int) -> None:
        self._told("topic", read, reading.offsets)

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

    def _rows(self, look: Callable[[], object]) -> Generator[tuple[str, bytes | None]]:
        """All rows, or those of the sample; `look` is called now and then, and may raise."""
        # A row without a key is no entity: outbox backfill start tells of it.
        query = self._source.every(of=self.sample.sql if self.sample is not None else None)
        with self._connection.cursor() as cursor:
            read = cursor.stream(query.encode(), {}, binary=True, size=ROWS_AT_ONCE)
            with closing(cast("Generator[tuple[Any, ...]]", read)) as rows:
                for number, (key, state, *_) in enumerate(rows):
                    if number % ROWS_AT_ONCE == 0:
                        self._told("source", number, None)
                        look()
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
