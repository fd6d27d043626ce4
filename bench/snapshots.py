"""Debezium's snapshots of a table: the initial one, of a new connector, and the incremental one, which a signal starts.

Set up for throughput as the other connectors here are (see `bench.debezium`), exactly once, and made to write what the
relay's backfill writes: the row as plain JSON, under its id.
"""

from __future__ import annotations

import time

import psycopg

from bench import table
from bench.debezium import BOUNDARIES, THROUGHPUT, Connect, InWorker
from bench.measure import wait_for
from bench.servers import Servers
from bench.workload import Load
from devstack.processes import LOOPBACK

_SECONDS = 120.0
_LOOK_SECONDS = 5.0
# Its default, 1,024 rows, is meant for databases that must not notice.
_CHUNK = "8192"
_SIGNALS = "CREATE TABLE debezium_signal (id varchar(42) PRIMARY KEY, type varchar(32) NOT NULL, data text)"


class Snapshot(InWorker):
    """A connector of the table's. `incremental`: it runs, and is told to take a snapshot; otherwise it is a new one."""

    exactly_once = True
    collapses = False

    def __init__(self, servers: Servers, connect: Connect, *, incremental: bool) -> None:
        self._incremental = incremental
        kind = "incremental" if incremental else "initial"
        self.name = f"Debezium, {kind} snapshot"
        self._prefix = f"snapshot-{kind}"
        self.topic = f"bench.{self._prefix}"
        self._servers = servers
        self._connect = connect
        self._number = 0
        self.postgres = servers.postgres(f"postgres-{self._prefix}", wal_level="logical")
        self.url = servers.database(self.postgres, "bench")
        self._filled = False
        self._asked = 0.0

    def prepare(self) -> None:
        """Make its topic, and start the worker; of the incremental one the connector, too, which stays."""
        with psycopg.connect(self.url) as connection:
            connection.execute(_SIGNALS)
        self._servers.topics.make(self.topic, settings={"cleanup.policy": "compact"})
        self._connect.start()

    @property
    def _id(self) -> str:
        return f"{self._prefix}-{self._number}"

    @property
    def _slot(self) -> str:
        return self._id.replace("-", "_")

    def _create(self) -> None:
        self._number += 1
        # A signal is a row that is captured, too, and the broker makes no topic by itself.
        self._servers.topics.make(f"{self._id}.public.debezium_signal", partitions=1)
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
                "table.include.list": "public.thing",
                "plugin.name": "pgoutput",
                "publication.autocreate.mode": "filtered",
                "slot.name": self._slot,
                "snapshot.mode": "no_data" if self._incremental else "initial",
                "snapshot.fetch.size": "10240",
                "signal.data.collection": "public.debezium_signal",
                "incremental.snapshot.chunk.size": _CHUNK,
                "tombstones.on.delete": "false",
                "value.converter": "org.apache.kafka.connect.json.JsonConverter",
                "value.converter.schemas.enable": "false",
                "transforms": "row,key,route",
                "transforms.row.type": "io.debezium.transforms.ExtractNewRecordState",
                "transforms.key.type": "org.apache.kafka.connect.transforms.ExtractField$Key",
                "transforms.key.field": "id",
                "transforms.route.type": "org.apache.kafka.connect.transforms.RegexRouter",
                "transforms.route.regex": r".*\.thing",
                "transforms.route.replacement": self.topic,
                "producer.override.compression.type": "lz4",
                **THROUGHPUT,
                **BOUNDARIES["poll"],
            },
        )

    def fill(self, load: Load) -> None:
        """Make the table, once; the incremental connector begins to stream, before it is asked for anything."""
        if not self._filled:
            table.make(self.url, load)
            self._filled = True
        if self._incremental and not self._number:
            self._create()
        if self._incremental:
            self._connect.ask("PUT", f"/connectors/{self._id}/resume")
            self._connect.wait_state(self._id, "RUNNING")
            self._wait_slot(active=True)

    def begin(self) -> None:
        """Ask for the snapshot: by a signal, or by a connector that is new."""
        if self._incremental:
            asked = '{"data-collections": ["public.thing"], "type": "incremental"}'
            with psycopg.connect(self.url) as connection:
                connection.execute(
                    "INSERT INTO debezium_signal VALUES (gen_random_uuid(), 'execute-snapshot', %s)", [asked]
                )
            return
        self._create()
        self._connect.ask("PUT", f"/connectors/{self._id}/resume")

    def end(self) -> None:
        """Stop the connector; a new one's slot goes with it, or the server would keep its log for it."""
        self._connect.ask("PUT", f"/connectors/{self._id}/stop")
        self._connect.wait_state(self._id, "STOPPED")
        self._wait_slot(active=False)
        if not self._incremental:
            self._connect.ask("DELETE", f"/connectors/{self._id}")
            with psycopg.connect(self.url) as connection:
                connection.execute("SELECT pg_drop_replication_slot(%s)", [self._slot])

    def _wait_slot(self, *, active: bool) -> None:
        def as_wanted() -> bool:
            self.check_alive()
            with psycopg.connect(self.url) as connection:
                row = connection.execute(
                    "SELECT active FROM pg_replication_slots WHERE slot_name = %s", [self._slot]
                ).fetchone()
            return row is not None and row[0] == active

        wait_for(as_wanted, seconds=_SECONDS, what=f"that the slot {self._slot} is {'' if active else 'in'}active")

    def check_alive(self) -> None:
        """The worker runs, and the connector, asked now and then, has not failed."""
        self._connect.check_alive()
        # A worker that is asked all the time would have less time to copy.
        if self._number and time.monotonic() - self._asked > _LOOK_SECONDS:
            self._asked = time.monotonic()
            self._connect.states(self._id)

    @property
    def insert(self) -> str:
        """A row more: its key and its description."""
        return "INSERT INTO thing (id, version, description) VALUES (substr(%s, 2)::bigint, 0, %s)"
