"""Debezium's PostgreSQL connector with its outbox event router, on Kafka Connect, exactly once.

Set up as its users are told to for throughput (or for latency), and given what the relay is given: the same broker, a
PostgreSQL server of its own with the same settings but for `wal_level`, the same rows, the same topic settings. The
worker is warm: it runs from before the first round, and only the connector is stopped and resumed. Its table is the
one that Debezium documents, with the payload as text, which costs its decoder least.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

from bench import install
from bench.measure import wait_for
from bench.servers import JVM_TUNING, Servers
from bench.workload import Load
from devstack.install import java_program
from devstack.kafka import LOGGING
from devstack.postgres import Postgres
from devstack.processes import LOOPBACK, Child, ServerError, free_port, tail

# As Kafka's own script for it has it (KAFKA_HEAP_OPTS in connect-distributed.sh).
HEAP: Sequence[str] = ("-Xms256M", "-Xmx2G")
WORKER = (
    "Kafka Connect's worker is warm, and counted from the resumption of a connector on. All connectors share it, so "
    "its peak memory is that of all of them and of all rounds since it was started, the warm-up's too, with the heap "
    "that Kafka's script gives it."
)
"""What is to be known of the figures of whatever runs in it."""
_START_SECONDS = 180.0
_ANSWER_SECONDS = 120.0
# A worker that is asked all the time whether it runs would have less time to.
_LOOK_SECONDS = 5.0

THROUGHPUT: Mapping[str, str] = {
    "max.batch.size": "8192",
    "max.queue.size": "32768",
    "poll.interval.ms": "10",
    "producer.override.linger.ms": "20",
    # With the client's default, 16 KiB, a record batch holds some fifty of these records.
    "producer.override.batch.size": "1000000",
    "producer.override.buffer.memory": "67108864",
}
LATENCY: Mapping[str, str] = {
    "max.batch.size": "8192",
    "max.queue.size": "32768",
    "poll.interval.ms": "5",
    "producer.override.linger.ms": "0",
}
BOUNDARIES: Mapping[str, Mapping[str, str]] = {
    "poll": {"transaction.boundary": "poll"},
    "interval": {"transaction.boundary": "interval", "transaction.boundary.interval.ms": "500"},
}

_TABLE = """
CREATE TABLE outbox (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    aggregatetype varchar(255) NOT NULL,
    aggregateid   varchar(255) NOT NULL,
    type          varchar(255) NOT NULL,
    payload       text
)
"""


class RefusedError(ServerError):
    """Kafka Connect does not do what it was asked, or not yet."""


class Connect:
    """One distributed Kafka Connect worker with exactly-once source support; started at its first connector."""

    def __init__(self, servers: Servers, jars: install.Jars = install.SOURCE) -> None:
        self._servers = servers
        self._jars = jars
        self._port = free_port()
        self._log = servers.directory / "connect.log"
        self.child: Child | None = None

    def start(self) -> None:
        """Start it and wait until it answers; nothing happens when it runs."""
        if self.child is not None:
            return
        self._jars.install()
        settings = {
            "bootstrap.servers": self._servers.kafka.bootstrap,
            "group.id": "bench-connect",
            "listeners": f"http://{LOOPBACK}:{self._port}",
            "rest.advertised.host.name": LOOPBACK,
            "exactly.once.source.support": "enabled",
            "key.converter": "org.apache.kafka.connect.storage.StringConverter",
            "value.converter": "org.apache.kafka.connect.storage.StringConverter",
            **{f"{what}.storage.topic": f"bench-connect-{what}" for what in ("config", "offset", "status")},
            **{f"{what}.storage.replication.factor": "1" for what in ("config", "offset", "status")},
            **{f"{what}.storage.partitions": "1" for what in ("offset", "status")},
            "connector.client.config.override.policy": "All",
            # All is on the class path, from one Maven resolution; nothing is to be looked for.
            "plugin.discovery": "hybrid_warn",
        }
        file = self._servers.directory / "connect.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        command = [
            *(java_program(), *HEAP, *JVM_TUNING, "-Ddevstack.level=WARN"),
            f"-Djava.io.tmpdir={self._servers.directory}",
            f"-Dlog4j2.configurationFile={LOGGING.as_uri()}",
            *("-cp", f"{self._jars.libs}/*", "org.apache.kafka.connect.cli.ConnectDistributed", str(file)),
        ]
        self.child = Child(command, log=self._log, cwd=self._servers.directory)
        wait_for(self._answers, seconds=_START_SECONDS, what=f"Kafka Connect's start (see {self._log})")

    def close(self) -> None:
        """Kill it."""
        child, self.child = self.child, None
        if child is not None:
            child.stop(seconds=0)

    def _answers(self) -> bool:
        self.check_alive()
        try:
            self.ask("GET", "/connectors")
        except (OSError, RefusedError):
            return False
        return True

    def check_alive(self) -> None:
        """The worker has not ended; `ServerError` with the end of its log otherwise."""
        if self.child is not None and (code := self.child.exit_code()) is not None:
            raise ServerError(
                f"Kafka Connect ended by itself (exit code {code}); the end of its log:\n{tail(self._log)}"
            )

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request; its answer. `RefusedError` with what it said when it refuses."""
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                read = answer.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(f"Kafka Connect: {method} {path}: {error.code} {error.read().decode()}") from error
        return json.loads(read) if read else None

    def create(self, name: str, settings: Mapping[str, str]) -> None:
        """Create a connector, stopped."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                self.ask("POST", "/connectors", {"name": name, "config": settings, "initial_state": "STOPPED"})
            except RefusedError as error:
                # A worker that has just joined its group refuses while it rebalances.
                if " 409 " not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def states(self, name: str) -> tuple[str, list[str]]:
        """In which state a connector and its tasks are; none while the worker does not say. A failed one raises."""
        self.check_alive()
        try:
            status = self.ask("GET", f"/connectors/{name}/status")
        except (OSError, RefusedError):
            return "", []
        for one in (status["connector"], *status["tasks"]):
            if one["state"] == "FAILED":
                trace = one.get("trace", "")[:2000]
                raise ServerError(f"{name} failed: {trace}\nThe end of its log:\n{tail(self._log)}")
        return status["connector"]["state"], [task["state"] for task in status["tasks"]]

    def wait_state(self, name: str, state: str) -> None:
        """Wait until a connector, and its task unless it is stopped, is in this state."""

        def there() -> bool:
            return self.states(name) == (state, [] if state == "STOPPED" else [state])

        wait_for(there, seconds=_ANSWER_SECONDS, what=f"that {name} is {state} (see {self._log})")


class InWorker:
    """What is the same of every connector of Debezium's: it runs in the worker alone."""

    _servers: Servers
    _connect: Connect
    postgres: Postgres

    def close(self) -> None:
        """Nothing runs but in the worker."""

    @property
    def pids(self) -> Mapping[str, int]:
        """The worker."""
        return {"Kafka Connect": self._connect.child.pid} if self._connect.child is not None else {}

    @property
    def trees(self) -> Mapping[str, int]:
        """Its PostgreSQL server, and the broker."""
        return {"PostgreSQL": self.postgres.pid, "Kafka": self._servers.kafka.pid}

    @property
    def versions(self) -> Mapping[str, str]:
        """Itself, and the worker that it runs in."""
        return install.SOURCE.versions

    def done(self, load: Load, added: int) -> bool:
        """A record for each row."""
        return added >= load.entries

    def details(self) -> Mapping[str, float]:
        """It tells nothing."""
        return {}


class Debezium(InWorker):
    """One connector; `boundary` (poll or interval) says when Connect ends a transaction."""

    exactly_once = True
    collapses = False

    def __init__(
        self, servers: Servers, connect: Connect, *, boundary: str = "poll", tuning: Mapping[str, str] = THROUGHPUT
    ) -> None:
        self.name = f"Debezium, {boundary}"
        self._id = f"debezium-{boundary}"
        self.topic = f"bench.{self._id}"
        self._servers = servers
        self._connect = connect
        self._settings = {**tuning, **BOUNDARIES[boundary]}
        self._asked = 0.0
        self.postgres = servers.postgres(f"postgres-{self._id}", wal_level="logical")
        self.url = servers.database(self.postgres, "bench")

    def prepare(self) -> None:
        """Make its table, topic, connector, and let it make its replication slot."""
        with psycopg.connect(self.url) as connection:
            connection.execute(_TABLE)
        self._servers.topics.make(self.topic, settings={"cleanup.policy": "compact"})
        self._connect.start()
        self._connect.create(
            self._id,
            {
                "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
                "tasks.max": "1",
                "exactly.once.support": "required",
                "database.hostname": LOOPBACK,
                "database.port": str(self.postgres.port),
                "database.user": "postgres",
                "database.password": "",
                "database.dbname": "bench",
                "topic.prefix": self._id,
                "table.include.list": "public.outbox",
                "plugin.name": "pgoutput",
                "publication.autocreate.mode": "filtered",
                "slot.name": "bench",
                "snapshot.mode": "no_data",
                "tombstones.on.delete": "false",
                "transforms": "outbox",
                "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
                # A fixed topic: the router's default puts the aggregate's type into the name.
                "transforms.outbox.route.topic.replacement": self.topic,
                "producer.override.compression.type": "lz4",
                **self._settings,
            },
        )
        self.begin()
        self.wait_running()
        self.end()

    def wait_running(self) -> None:
        """Wait until the connector and its task run, and read from the replication slot."""
        self._connect.wait_state(self._id, "RUNNING")

        def reads() -> bool:
            self.check_alive()
            with psycopg.connect(self.url) as connection:
                row = connection.execute("SELECT active FROM pg_replication_slots").fetchone()
            return bool(row and row[0])

        wait_for(reads, seconds=_ANSWER_SECONDS, what="Debezium's replication slot")

    def confirmed(self) -> int:
        """Up to where of the write-ahead log it has said that all is published, in bytes."""
        with psycopg.connect(self.url) as connection:
            row = connection.execute("SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots").fetchone()
        return int(row[0] or 0) if row else 0

    def fill(self, load: Load) -> None:
        """Write rows; those of the round before are gone."""
        with psycopg.connect(self.url) as connection:
            connection.execute("TRUNCATE outbox")
        load.fill(
            self.url,
            "outbox",
            ("aggregatetype", "aggregateid", "type", "payload"),
            ("'thing'", load.key_sql, "'changed'", load.state_sql),
        )

    def begin(self) -> None:
        """Resume the connector."""
        self._connect.ask("PUT", f"/connectors/{self._id}/resume")

    def end(self) -> None:
        """Stop the connector; its task ends, the worker stays."""
        self._connect.ask("PUT", f"/connectors/{self._id}/stop")
        self._connect.wait_state(self._id, "STOPPED")

    def check_alive(self) -> None:
        """The worker runs, and, asked now and then, the connector and its task have not failed."""
        self._connect.check_alive()
        if time.monotonic() - self._asked > _LOOK_SECONDS:
            self._asked = time.monotonic()
            self._connect.states(self._id)

    @property
    def insert(self) -> str:
        """As documented, without the delete that usually follows."""
        return "INSERT INTO outbox (aggregatetype, aggregateid, type, payload) VALUES ('thing', %s, 'changed', %s)"
