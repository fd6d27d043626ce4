"""Real servers, set up as for production: the broker and the databases must not be the handicap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from bench.topics import Topics
from devstack.kafka import Kafka
from devstack.postgres import Postgres

# As Kafka's own start scripts have it (KAFKA_JVM_PERFORMANCE_OPTS); those of devstack favour a quick start.
JVM_TUNING: Sequence[str] = (
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
BROKER_HEAP = ("-Xms1g", "-Xmx1g")

POSTGRES_OPTIONS = {
    "shared_buffers": "1GB",
    # Checkpoints by time alone, and none within a round.
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "synchronous_commit": "on",
    "fsync": "on",
}


@dataclass
class Servers:
    """One broker, and a PostgreSQL server for each that asks: they do not disturb one another's WAL."""

    directory: Path
    stack: ExitStack
    kafka: Kafka
    topics: Topics
    _postgres: dict[str, Postgres] = field(default_factory=dict)

    def postgres(self, name: str, *, wal_level: str = "replica") -> Postgres:
        """The server of this name, started at the first call."""
        if name not in self._postgres:
            server = Postgres(self.directory / name, options={**POSTGRES_OPTIONS, "wal_level": wal_level})
            # Its data goes away with it: no need to put it in order.
            self.stack.callback(server.stop, "immediate")
            server.start()
            self._postgres[name] = server
        return self._postgres[name]

    def database(self, server: Postgres, name: str) -> str:
        """Make a database; its URL."""
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return server.url(name)

    def versions(self) -> dict[str, str]:
        """What runs."""
        found = {}
        for server in list(self._postgres.values())[:1]:
            with psycopg.connect(server.url()) as connection:
                row = connection.execute("SHOW server_version").fetchone()
            found["PostgreSQL"] = str(row[0]).split()[0] if row else "?"
        return found


@contextmanager
def servers(directory: Path) -> Iterator[Servers]:
    """A broker, running, and whatever else is asked for; all ended at the end."""
    with ExitStack() as stack:
        kafka = Kafka(
            directory / "kafka",
            jvm=(*BROKER_HEAP, *JVM_TUNING),
            properties={"log.cleaner.dedupe.buffer.size": str(128 * 1024 * 1024)},
        )
        stack.callback(kafka.kill)
        kafka.start()
        yield Servers(directory, stack, kafka, Topics(kafka.bootstrap))
