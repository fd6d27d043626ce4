"""Part 9, read model: a topic of a million records into a consumer's PostgreSQL, and what changes after that.

Beside it Debezium's JDBC sink connector (upsert, delete on null), which needs a schema with each message and gets
topics of its own with the same states; and what a loader written by hand would do: a bare consumer of the topic, then
`COPY` of the same rows into a table like the copy's, one after the other, their times added up. The slower of these two
alone is the stricter limit: of a loader that did both at once, on a machine that had room for both.

The load is timed from the start of the process, or of the connector, until the last row can be read. The updates go to
a topic of the round's own, whose keys are there before. First a burst, in one transaction of Kafka's, which is written
before the clock runs and seen by nobody: timed from the beginning of its commit until the last row is new. Then one by
one, each timed from the producer's commit until its row can be read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Producer

from bench import install, limits
from bench.debezium import WORKER, Connect
from bench.measure import Spread, percentile, run_measured, turned, usage, wait_for
from bench.options import Options
from bench.part import Part
from bench.relay import PROGRAM
from bench.report import Panel, Report, Series
from bench.servers import Servers, servers
from bench.topics import PARTITIONS
from bench.traffic import state
from devstack.install import ROOT
from devstack.postgres import Postgres
from devstack.processes import Child, ServerError, tail

NAME = "read-model"
PEERS = ("model", "sink", "limit")
MODEL, SINK = "read model", "Debezium's JDBC sink"
LIMIT, STRICTER = "a bare consumer, then COPY", "the slower of the two alone"
LOAD, UPDATES, CPU = "records/s, first load", "records/s, updates", "CPU for a million"
MEMORY, IN_ALL = "peak memory, first load", "peak memory, in all"
P50, P99 = "p50 of a change", "p99 of a change"
PLAIN, WITH_SCHEMA = "bench.things", "bench.things-with-schema"
_UPDATED = 0.1
_LOOK_SECONDS = 0.1
# So many of the keys that were written last are looked for: some of each partition are among them.
_LAST = 100
# One by one: how many changes, and how often their row is looked for.
_CHANGES = 100
_ROW_SECONDS = 0.002
# How often a connector is asked whether it has failed.
_ASK_SECONDS = 5.0
_STEP = 20_000
_FLUSH_SECONDS = 60
# Of the records, until memory is looked at for the first time.
_BEGINNING = 0.1
_SCHEMA = {
    "type": "struct",
    "optional": False,
    "name": "thing",
    "fields": [
        {"type": "int64", "optional": False, "field": "version"},
        {"type": "string", "optional": False, "field": "note"},
    ],
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """One contender in one round: records a second; CPU seconds for a million records; bytes; seconds of each change.

    `peak` is that until the end of the load, `early` until its first tenth, `in_all` until the last change. `stricter`:
    of the limit, the load by the slower half of it alone.
    """

    load: float
    peak: int
    updates: float | None = None
    cpu: float | None = None
    early: int | None = None
    in_all: int | None = None
    changes: Sequence[float] = ()
    stricter: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What a contender of a round is given."""

    servers: Servers
    options: Options
    name: str
    updates: str

    @property
    def changed(self) -> int:
        """How many records an update is."""
        return max(1, round(self.options.entries * _UPDATED))


class Filler:
    """Writes records of `count` keys as a relay does, in transactions; `base` makes them newer than those before."""

    def __init__(self, servers: Servers, topic: str, *, schema: bool) -> None:
        self._topic = topic
        self._schema = schema
        self._producer = Producer(
            {
                "bootstrap.servers": servers.kafka.bootstrap,
                "transactional.id": f"bench-fill-{topic}",
                "compression.type": "lz4",
                "linger.ms": 20,
                "queue.buffering.max.messages": 1_000_000,
                # A burst is held back for as long as it takes to write it.
                "transaction.timeout.ms": 600_000,
                "partitioner": "murmur2_random",
            }
        )
        self._producer.init_transactions(30)

    def value(self, number: int) -> str:
        """The state that a number has."""
        value = state(number)
        return json.dumps({"schema": _SCHEMA, "payload": json.loads(value)}) if self._schema else value

    def made(self, count: int, *, base: int = 0) -> list[tuple[str, str, int]]:
        """The records, ready to be written: key, value, entry id."""
        return [(f"k{number}", self.value(base + number), base + number + 1) for number in range(count)]

    def write(self, records: Sequence[tuple[str, str, int]]) -> None:
        """Write them, 20,000 in a transaction."""
        for first in range(0, len(records), _STEP):
            self._producer.begin_transaction()
            self._produce(records[first : first + _STEP])
            self._producer.commit_transaction(60)

    def hold(self, records: Sequence[tuple[str, str, int]]) -> None:
        """Write them in one transaction that stays open: they are with the broker, and seen at `release`."""
        self._producer.begin_transaction()
        for first in range(0, len(records), _STEP):
            self._produce(records[first : first + _STEP])
            if left := self._producer.flush(_FLUSH_SECONDS):
                raise ServerError(f"{left} records were not taken by Kafka in {_FLUSH_SECONDS} s.")

    def release(self) -> None:
        """Commit what is held."""
        self._producer.commit_transaction(60)

    def _produce(self, records: Sequence[tuple[str, str, int]]) -> None:
        for key, value, entry_id in records:
            self._producer.produce(self._topic, value, key, headers={"outbox-id": b"%d" % entry_id})

    def fill(self, count: int) -> None:
        """Write so many keys, without holding them all at once."""
        for first in range(0, count, _STEP):
            numbers = range(first, min(first + _STEP, count))
            self.write([(f"k{number}", self.value(number), number + 1) for number in numbers])


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Read model: {options.entries:,} records",
        options.command,
        {"records": options.entries, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    found: dict[str, list[Loaded]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        connect = Connect(those, install.SINK)
        stack.callback(connect.close)
        takes: dict[str, Callable[[Run], Loaded]] = {}
        if "model" in options.peers:
            takes[MODEL] = _model
        if "sink" in options.peers:
            connect.start()
            takes[SINK] = lambda one: _sink(one, connect)
        if "limit" in options.peers:
            takes[LIMIT] = _limit
        for topic, schema in ((PLAIN, False), (WITH_SCHEMA, True)):
            if not schema or SINK in takes:
                view.step(f"writing {options.entries:,} records into {topic}")
                those.topics.make(topic, settings={"cleanup.policy": "compact"})
                Filler(those, topic, schema=schema).fill(options.entries)
        for number in options.numbers():
            for place, who in enumerate(turned(list(takes), number)):
                name = f"round{number + options.warm_up}_{place}"
                one = takes[who](Run(those, options, name, f"bench.updates-{name}"))
                view.step(_shown(who, one))
                if number >= 0:
                    found.setdefault(who, []).append(one)
        report.versions = those.versions([]) | (install.SINK.versions if SINK in takes else {})
    _tell(report, found)
    return report


def _shown(who: str, one: Loaded) -> str:
    updates = "" if one.updates is None else f", updates {one.updates:,.0f}/s"
    return f"{who}: {one.load:,.0f} records/s{updates}, {one.peak / 1e6:,.0f} MB"


def _tell(report: Report, found: Mapping[str, Sequence[Loaded]]) -> None:
    """The series and ratios."""
    for who, rounds in found.items():
        report.series.append(Series(who, LOAD, "", [one.load for one in rounds]))
        if updates := [one.updates for one in rounds if one.updates is not None]:
            report.series.append(Series(who, UPDATES, "", updates))
        if cpu := [one.cpu for one in rounds if one.cpu is not None]:
            report.series.append(Series(who, CPU, "s", cpu, 2))
        report.series.append(Series(who, MEMORY, "MB", [one.peak / 1e6 for one in rounds]))
        if in_all := [one.in_all / 1e6 for one in rounds if one.in_all is not None]:
            report.series.append(Series(who, IN_ALL, "MB", in_all))
        for figure, share in ((P50, 0.5), (P99, 0.99)):
            if late := [percentile(sorted(one.changes), share) * 1000 for one in rounds if one.changes]:
                report.series.append(Series(who, figure, "ms", late, 1))
        if stricter := [one.stricter for one in rounds if one.stricter is not None]:
            report.series.append(Series(STRICTER, LOAD, "", stricter))
            report.notes.append(
                f"{LIMIT[0].upper()}{LIMIT[1:]}: one after the other, as a loader written by hand would do it; their "
                "times are added up. The reading is timed with the start of its process, COPY without, and from a "
                f"file whose rows are ready. {STRICTER.capitalize()}: the longer of both times, as if the other one "
                "cost nothing."
            )
    if SINK in found:
        report.notes += [WORKER, f"{SINK} delivers at least once."]
    bars = {one.contender: one.contender for one in report.series if one.figure == LOAD}
    report.panels.append(Panel("", [LOAD], bars, [MODEL]))
    if MODEL not in found:
        return
    mine = report.of(MODEL, LOAD)
    if LIMIT in found:
        report.ratio(f"first load: read model / {LIMIT}", mine, report.of(LIMIT, LOAD), aim=0.5)
        report.ratio(f"first load: read model / {STRICTER}", mine, report.of(STRICTER, LOAD))
    if SINK in found:
        report.ratio(f"first load: read model / {SINK}", mine, report.of(SINK, LOAD), aim=3)
        report.ratio(f"updates: read model / {SINK}", report.of(MODEL, UPDATES), report.of(SINK, UPDATES))
        for figure in (P50, P99):
            report.ratio(
                f"{figure}: read model / {SINK}", report.of(MODEL, figure), report.of(SINK, figure), at_least=False
            )
        memory = report.of(MODEL, MEMORY), report.of(SINK, MEMORY)
        report.ratio(f"{MEMORY}: read model / {SINK}", *memory, at_least=False)
    early = [one.early / 1e6 for one in found[MODEL] if one.early]
    report.ratio(
        "peak memory: all of the load / its first tenth", report.of(MODEL, MEMORY), early, aim=1.2, at_least=False
    )
    middle = Spread.of([one / 1e6 for one in map(_early, found[MODEL])]).median
    report.notes.append(f"Peak memory of the read model when its tables had a tenth of their size: {middle:,.0f} MB.")


def _early(one: Loaded) -> float:
    return float(one.early or 0)


# -- the contenders --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a table is to have: so many rows of which a condition holds; and which keys, as the last ones written."""

    table: str
    rows: int
    condition: str = "true"

    def last_are_there(self, connection: psycopg.Connection[tuple[Any, ...]]) -> bool:
        """Cheap, by the primary key: whether the rows that were written last are there."""
        last = [f"k{number}" for number in range(max(0, self.rows - _LAST), self.rows)]
        return self._count(connection, "key = ANY(%s) AND ", last) == len(last)

    def all_are_there(self, connection: psycopg.Connection[tuple[Any, ...]]) -> bool:
        """Counted, one by one."""
        return self._count(connection, "", None) == self.rows

    def _count(self, connection: psycopg.Connection[tuple[Any, ...]], narrowed: str, keys: list[str] | None) -> int:
        query = f"SELECT count(*) FROM {self.table} WHERE {narrowed}{self.condition}".encode()
        row = connection.execute(query, None if keys is None else [keys]).fetchone()
        return int(row[0]) if row else 0


class Watch:
    """Watches a round's tables over one connection, so that they, and the cores, are left to the contender."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], check: Callable[[], None]) -> None:
        """`check` raises when nothing more is to be waited for."""
        self._connection = connection
        self._check = check
        # A table that nobody has analyzed must not be taken for a small one.
        connection.execute("SET enable_seqscan = off")

    def until(self, awaited: Sequence[Awaited], began: float, seconds: float, what: str) -> float:
        """How long it took since `began` until all was there.

        By signs, until the last keys are there, which are looked for by the index; then all is counted, once as a rule:
        if rows are missing, it goes on. The count sees what was there when it began, and that is the time.
        """
        while True:
            self._check()
            now = time.monotonic()
            if all(one.last_are_there(self._connection) for one in awaited):
                with self._connection.transaction():
                    self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    self._connection.execute("SET LOCAL enable_seqscan = on")
                    now = time.monotonic()
                    if all(one.all_are_there(self._connection) for one in awaited):
                        return now - began
            if now - began > seconds:
                raise ServerError(f"{what} did not happen in {seconds:g} s.")
            time.sleep(_LOOK_SECONDS)

    def size(self, awaited: Sequence[Awaited]) -> int:
        """How many bytes the tables have, with what is not committed yet."""
        sizes = "SELECT coalesce(sum(pg_relation_size(name::regclass)), 0)::bigint FROM unnest(%s::text[]) AS name"
        row = self._connection.execute(sizes, [[one.table for one in awaited]]).fetchone()
        return int(row[0]) if row else 0


@contextmanager
def watching(url: str, check: Callable[[], None]) -> Iterator[Watch]:
    """A `Watch` of a database's tables."""
    # Not prepared: a plan that was made for an empty table would stay.
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        yield Watch(connection, check)


def peak_at(looks: Sequence[tuple[int, int]], share: float) -> int:
    """Of looks at a size and a peak, the peak when the size was first so much of the last one."""
    return next(peak for size, peak in looks if size >= share * looks[-1][0])


def _finish(child: Child, log: Path, seconds: float, what: str) -> None:
    if not child.wait(seconds) or child.exit_code() != 0:
        child.stop(seconds=0)
        raise ServerError(f"{what} failed:\n{tail(log)}")


def _is_there(connection: psycopg.Connection[tuple[Any, ...]], query: str, key: str, newest: int) -> bool:
    return connection.execute(query.encode(), [key, newest]).fetchone() is not None


def _changes(url: str, filler: Filler, run: Run, table: str, column: str) -> list[float]:
    """Seconds of some changes, one by one: from the producer's commit until the row can be read."""
    found: list[float] = []
    with psycopg.connect(url, autocommit=True) as connection:
        for number in range(_CHANGES):
            # Newer than the first records, and than the burst.
            newest = 2 * run.options.entries + number
            key = f"k{number % run.changed}"
            filler.write([(key, filler.value(newest), newest + 1)])
            began = time.monotonic()
            there = partial(
                _is_there, connection, f"SELECT 1 FROM {table} WHERE key = %s AND {column} >= %s", key, newest
            )
            wait_for(there, seconds=run.options.seconds, what="a change", pause=_ROW_SECONDS)
            found.append(time.monotonic() - began)
    return found


@contextmanager
def _database(servers: Servers, name: str) -> Iterator[str]:
    """A database of the round's own, which goes when it is over: its upkeep must not meet the next contender."""
    server = servers.postgres("postgres")
    url = servers.database(server, name)
    try:
        yield url
    finally:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _model(run: Run) -> Loaded:
    """`outbox read-model run`, as a process of its own."""
    with _database(run.servers, f"model_{run.name}") as url:
        return _model_in(run, url)


def _model_in(run: Run, url: str) -> Loaded:
    servers, entries = run.servers, run.options.entries
    servers.topics.make(run.updates, settings={"cleanup.policy": "compact"})
    filler = Filler(servers, run.updates, schema=False)
    filler.fill(run.changed)
    burst = filler.made(run.changed, base=entries)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")} | {
        "BENCH_MODEL": f"model-{run.name}",
        "BENCH_DATABASE_URL": url,
        "BENCH_TOPIC": PLAIN,
        "BENCH_UPDATES": run.updates,
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": servers.kafka.bootstrap,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
    }
    log = servers.directory / f"model-{run.name}.log"
    made = Child([sys.executable, "-m", "bench.copies"], log=log, env=environment, cwd=ROOT)
    _finish(made, log, 60, "making the read model's tables")
    loaded = [Awaited("thing_copy", entries), Awaited("update_copy", run.changed)]
    updated = [Awaited("update_copy", run.changed, f"entry_id > {entries}")]
    whole = entries + run.changed
    looks: list[tuple[int, int]] = []
    began = time.monotonic()
    command = [str(PROGRAM), "read-model", "run", "--app", "bench.copies:model"]
    child = Child(command, log=log, env=environment, cwd=ROOT)

    def check() -> None:
        if (code := child.exit_code()) is not None:
            raise ServerError(f"The read model ended by itself (exit code {code}):\n{tail(log)}")
        looks.append((watch.size(loaded), usage(child.pid).peak_bytes))

    try:
        with watching(url, check) as watch:
            took = watch.until(loaded, began, run.options.seconds, "the first load")
            used = usage(child.pid)
            early = peak_at(looks, _BEGINNING)
            filler.hold(burst)
            began = time.monotonic()
            filler.release()
            spent = watch.until(updated, began, run.options.seconds, "the updates")
        changes = _changes(url, filler, run, "update_copy", "entry_id")
        in_all = usage(child.pid).peak_bytes
    finally:
        child.stop()
    cpu = used.cpu_seconds / whole * 1e6
    return Loaded(whole / took, used.peak_bytes, run.changed / spent, cpu, early, in_all, changes)


def _sink(run: Run, connect: Connect) -> Loaded:
    """Debezium's JDBC sink: upsert by the record's key, delete on null, and what is superseded is left out."""
    with _database(run.servers, f"sink_{run.name}") as url:
        return _sink_in(run, connect, url)


def _sink_in(run: Run, connect: Connect, url: str) -> Loaded:
    servers, entries = run.servers, run.options.entries
    updates = f"{run.updates}-with-schema"
    topics = {WITH_SCHEMA: "things", updates: "updates"}
    servers.topics.make(updates, settings={"cleanup.policy": "compact"})
    filler = Filler(servers, updates, schema=True)
    filler.fill(run.changed)
    burst = filler.made(run.changed, base=entries)
    with psycopg.connect(url) as connection:
        for table in topics.values():
            connection.execute(
                f"CREATE TABLE {table} (key text PRIMARY KEY, version bigint NOT NULL, note text NOT NULL)".encode()
            )
    name = f"sink-{run.name}"
    connect.create(name, sink_settings(servers.postgres("postgres"), f"sink_{run.name}", list(topics)))
    began = asked = time.monotonic()
    connect.ask("PUT", f"/connectors/{name}/resume")
    child = connect.child
    if child is None:
        raise ServerError("Kafka Connect does not run.")
    before = usage(child.pid).cpu_seconds

    def check() -> None:
        nonlocal asked
        connect.check_alive()
        if time.monotonic() - asked > _ASK_SECONDS:
            connect.states(name)
            asked = time.monotonic()

    loaded = [Awaited("things", entries), Awaited("updates", run.changed)]
    updated = [Awaited("updates", run.changed, f"version >= {entries}")]
    whole = entries + run.changed
    with watching(url, check) as watch:
        took = watch.until(loaded, began, run.options.seconds, "the sink's first load")
        used = usage(child.pid)
        filler.hold(burst)
        began = time.monotonic()
        filler.release()
        spent = watch.until(updated, began, run.options.seconds, "the sink's updates")
    changes = _changes(url, filler, run, "updates", "version")
    in_all = usage(child.pid).peak_bytes
    connect.ask("DELETE", f"/connectors/{name}")
    cpu = (used.cpu_seconds - before) / whole * 1e6
    return Loaded(whole / took, used.peak_bytes, run.changed / spent, cpu, None, in_all, changes)


def sink_settings(postgres: Postgres, database: str, topics: Sequence[str]) -> dict[str, str]:
    """The connector's, for throughput."""
    # The table is named by the topic: its second part, without what comes after (a round's name, `-with-schema`).
    return {
        "connector.class": "io.debezium.connector.jdbc.JdbcSinkConnector",
        "tasks.max": str(PARTITIONS),
        "topics": ",".join(topics),
        "connection.url": f"jdbc:postgresql://127.0.0.1:{postgres.port}/{database}?reWriteBatchedInserts=true",
        "connection.username": "postgres",
        "connection.password": "",
        "insert.mode": "upsert",
        "delete.enabled": "true",
        "primary.key.mode": "record_key",
        "primary.key.fields": "key",
        "schema.evolution": "none",
        "use.reduction.buffer": "true",
        "batch.size": "5000",
        "key.converter": "org.apache.kafka.connect.storage.StringConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "true",
        "transforms": "key,table",
        # It takes no key that is not a structure.
        "transforms.key.type": "org.apache.kafka.connect.transforms.HoistField$Key",
        "transforms.key.field": "key",
        "transforms.table.type": "org.apache.kafka.connect.transforms.RegexRouter",
        "transforms.table.regex": r"bench\.(thing|update)s.*",
        "transforms.table.replacement": "$1s",
        "consumer.override.isolation.level": "read_committed",
        "consumer.override.auto.offset.reset": "earliest",
        "consumer.override.max.poll.records": "5000",
    }


def _limit(run: Run) -> Loaded:
    """A bare consumer, as a process, and after it the rows from a file, by psql's \\copy, into a table with its key.

    What a loader written by hand would do that reads all and then copies it; so both times are added up.
    """
    servers, entries = run.servers, run.options.entries
    directory = servers.directory
    given = {
        "bootstrap": servers.kafka.bootstrap,
        "topic": PLAIN,
        "ends": servers.topics.ends(PLAIN),
        "out": str(directory / "reader.bin"),
    }
    log = directory / "reader.log"
    reader = Child([sys.executable, "-m", "bench.traffic", "reader", json.dumps(given)], log=log, cwd=ROOT)
    read, used = run_measured(reader, seconds=run.options.seconds, what=f"a bare consumer (see {log})")
    rows = directory / "rows.copy"
    if not rows.exists():
        with rows.open("w") as file:
            file.writelines(f"k{n}\t{state(n)}\t{n + 1}\t2026-01-01 00:00:00+00\n" for n in range(entries))
    with _database(servers, f"limit_{run.name}") as url:
        copied = _copied(url, rows, entries, directory)
    spent = entries / copied.rate
    peak = max(used.peak_bytes, copied.usage.peak_bytes)
    return Loaded(entries / (read + spent), peak, stricter=entries / max(read, spent))


def _copied(url: str, rows: Path, entries: int, directory: Path) -> limits.Limit:
    with psycopg.connect(url) as connection:
        connection.execute(
            'CREATE TABLE thing_copy (key text COLLATE "C" PRIMARY KEY, state jsonb NOT NULL, entry_id bigint NOT NULL,'
            " updated_at timestamptz NOT NULL)"
        )
    return limits.copy_in(url, "thing_copy", rows, entries, directory)


PART = Part(NAME, run, PEERS, by_entries=True)
