"""The limits: how fast the rows leave PostgreSQL when nobody does anything with them, and how fast Kafka takes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg

from bench.measure import Usage, run_measured
from bench.servers import JVM_TUNING
from bench.topics import PARTITIONS, Topics
from bench.workload import Load
from devstack.kafka import Kafka, java_command
from devstack.postgres import Postgres
from devstack.processes import Child, ServerError, tail

_SECONDS = 600.0
# How long the tool keeps a transaction open, milliseconds: about as long as the relay does under load.
_TRANSACTION_MS = 100
_SAMPLE = 10_000
PRODUCER_TOPIC = "bench.limit"

PLANNER: Mapping[str, str] = {
    **{f"enable_{way}": "off" for way in ("seqscan", "bitmapscan", "sort", "incremental_sort")},
    "jit": "off",
}
"""The relay's settings of the planner (outbox.reader sets them): rows in the order of the index."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One run: rows or records a second, and what the client used."""

    rate: float
    usage: Usage


def copy_out(url: str, load: Load, directory: Path) -> Limit:
    """`COPY` of the last rows that `load` wrote, the columns that a relay needs, in id order.

    Read as the relay reads: by the index, between ids that are known beforehand.
    """
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT id FROM outbox.entries WHERE shard = 0 ORDER BY id DESC LIMIT 1").fetchone()
    last = int(row[0]) if row else 0
    query = (
        "SELECT id, type, key, state, created_at FROM outbox.entries "
        f"WHERE shard = 0 AND id > {last - load.entries} AND id <= {last} ORDER BY id"
    )
    return copy_query(url, query, load.entries, directory, settings=PLANNER)


def copy_query(url: str, query: str, rows: int, directory: Path, *, settings: Mapping[str, str] = {}) -> Limit:
    """`COPY` of a query, of which so many rows are expected, through psql to nowhere."""
    # Of a \copy to a file psql prints the tag; of COPY TO STDOUT it does not.
    return _psql_copy(url, rf"\copy ({query}) TO '/dev/null' (FORMAT binary)", rows, directory, settings)


def copy_in(url: str, table: str, file: Path, rows: int, directory: Path) -> Limit:
    """`COPY` of a file of so many rows, in the text format, into a table, through psql."""
    return _psql_copy(url, rf"\copy {table} FROM '{file}'", rows, directory, {})


def _psql_copy(url: str, copy: str, rows: int, directory: Path, settings: Mapping[str, str]) -> Limit:
    """The time is psql's own of the statement, from sending it to the last row: starting and connecting are left out.

    The CPU is that of the whole psql.
    """
    log = directory / "copy.log"
    told = log.stat().st_size if log.exists() else 0
    command = [Postgres.bin("psql"), "--no-psqlrc", r"--command=\timing on", f"--command={copy}", url]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {
        "PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        "LC_ALL": "C",
    }
    _, used = run_measured(Child(command, log=log, env=environment), seconds=_SECONDS, what=f"COPY (see {log})")
    said = _said(log, told)
    found = re.search(r"^COPY (\d+)\nTime: ([\d.]+) ms", said, re.MULTILINE)
    if found is None or int(found[1]) != rows:
        raise ServerError(f"COPY was to write {rows} rows, and psql said:\n{said}")
    return Limit(rows / float(found[2]) * 1000, used)


def _said(log: Path, told: int) -> str:
    """What was written into a log from this place on."""
    return log.read_bytes()[told:].decode(errors="replace")


def write_sample(load: Load, url: str, directory: Path) -> Path:
    """States as `load` writes them, one a line: what `ProducerPerformance` sends in random order."""
    sample = directory / "states.txt"
    with psycopg.connect(url) as connection:
        query = f"SELECT {load.state_sql} FROM generate_series(1, {_SAMPLE}) n".encode()
        sample.write_text("\n".join(str(row[0]) for row in connection.execute(query)) + "\n")
    return sample


def producer_performance(kafka: Kafka, topics: Topics, load: Load, sample: Path) -> Limit:
    """Kafka's own `ProducerPerformance` with a transactional id, and the relay's settings as the Java client has them.

    The rate is the tool's own, without what it counts as warming up. It sends records without keys, whose partition
    the client need not compute and which fill one batch after another: a limit, no contender.
    """
    topics.make(PRODUCER_TOPIC, partitions=PARTITIONS)
    log = sample.with_name("producer-performance.log")
    told = log.stat().st_size if log.exists() else 0
    before = sum(topics.ends(PRODUCER_TOPIC).values())
    # Its own measure leaves these out: the Java machine compiles while it sends them.
    warm_up = load.entries // 4
    command = java_command(
        "org.apache.kafka.tools.ProducerPerformance",
        *("--topic", PRODUCER_TOPIC, "--num-records", str(load.entries + warm_up), "--throughput", "-1"),
        *("--warmup-records", str(warm_up), "--payload-file", str(sample)),
        *("--transactional-id", "bench-limit", "--transaction-duration-ms", str(_TRANSACTION_MS)),
        *("--bootstrap-server", kafka.bootstrap, "--command-property"),
        *("acks=all", "linger.ms=5", "batch.size=1000000", "compression.type=lz4", "buffer.memory=67108864"),
        jvm=("-Xmx512m", *JVM_TUNING, "-Ddevstack.level=WARN"),
        tmp=sample.parent,
    )
    _, used = run_measured(Child(command, log=log), seconds=_SECONDS, what=f"ProducerPerformance (see {log})")
    text = _said(log, told)
    # The last summary is that of the records after the warm-up.
    rates = re.findall(r"records sent, ([\d.]+) records/sec \([\d.]+ MB/sec\).* 50th,", text)
    if not rates:
        raise ServerError(f"ProducerPerformance printed no summary:\n{tail(log)}")
    added = sum(topics.ends(PRODUCER_TOPIC).values()) - before
    if added < load.entries + warm_up:
        raise ServerError(f"ProducerPerformance wrote {added} offsets for {load.entries + warm_up} records.")
    return Limit(float(rates[-1]), used)
