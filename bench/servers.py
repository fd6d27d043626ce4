"""Real servers, set up as for production: the broker and the databases must not be the handicap."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import confluent_kafka
import psycopg
from psycopg import sql

from bench.contender import Contender
from bench.topics import Topics
from devstack.install import LIBS, java_program
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

    def versions(self, contenders: Iterable[Contender]) -> dict[str, str]:
        """What runs: the servers, the clients that the benchmarks and the relay share, and these contenders."""
        found: dict[str, str] = {}
        for one in contenders:
            found |= one.versions
        for server in list(self._postgres.values())[:1]:
            with psycopg.connect(server.url()) as connection:
                found["PostgreSQL"] = connection.info.parameter_status("server_version") or "?"
        java = subprocess.run([java_program(), "-version"], capture_output=True, text=True, check=False)
        return found | {
            "Kafka": kafka_version(),
            "Java": next(iter(re.findall(r'version "([^"]+)"', java.stderr + java.stdout)), "?"),
            "confluent-kafka": metadata.version("confluent-kafka"),
            "librdkafka": confluent_kafka.libversion()[0],
            "psycopg": psycopg.__version__,
            "libpq": psycopg.pq.version_pretty(psycopg.pq.version()),
        }


def kafka_version() -> str:
    """The broker's, as the name of its jar has it."""
    return next((jar.stem.removeprefix("kafka-clients-") for jar in LIBS.glob("kafka-clients-*.jar")), "?")


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
