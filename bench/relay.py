"""The relay as a user runs it: its own process, by the installed command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from bench.contender import Contender
from bench.servers import Servers
from bench.workload import Load
from devstack.processes import Child, ServerError, tail
from outbox import schema
from outbox._version import __version__

PROGRAM = Path(sys.executable).with_name("outbox")
STOP_SECONDS = 30.0


class Relay:
    """`outbox relay`, one shard, default settings; started for each round, as after a deployment."""

    exactly_once = True
    collapses = True

    def __init__(self, servers: Servers, *, name: str = "relay", beside: Contender | None = None) -> None:
        """`beside`: in whose database the outbox is made, instead of one of its own."""
        self.name = name
        self.topic = f"bench.{name}"
        self._servers = servers
        self.postgres = servers.postgres("postgres") if beside is None else beside.postgres
        self.url = servers.database(self.postgres, f"bench_{name}") if beside is None else beside.url
        self._log = servers.directory / f"{name}.log"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("OUTBOX_")} | {
            "OUTBOX_DATABASE_URL": self.url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": servers.kafka.bootstrap,
            "OUTBOX_REPLICATION_FACTOR": "1",
            "OUTBOX_LOG_FORMAT": "json",
            # One line a transaction: the relay's own times.
            "OUTBOX_LOG_LEVEL": "debug",
        }
        self._child: Child | None = None
        self._told = 0

    def prepare(
        self,
        *,
        types: Mapping[str, str] | None = None,
        sources: Mapping[str, str] | None = None,
        partitions: int | None = None,
        slots: int | None = None,
    ) -> None:
        """Make the outbox, its entity types (by name, their topics; else one type, `thing`) and the topics.

        `sources`: by type, its query of all rows.
        """
        settings = schema.Settings(name=f"bench-{self.name}")
        with psycopg.connect(self.url) as connection:
            schema.install(connection, settings if slots is None else replace(settings, slots=slots))
            for name, topic in (types or {"thing": self.topic}).items():
                connection.execute(
                    "INSERT INTO outbox.entity_types (name, topic, topic_settings, source) VALUES (%s, %s, %s, %s)",
                    [
                        *(name, topic, Jsonb({} if partitions is None else {"partitions": partitions})),
                        (sources or {}).get(name),
                    ],
                )
        self.command("topics", "apply", "--yes")

    def command(self, *arguments: str) -> str:
        """Run a command of the command line to its end; its output."""
        done = subprocess.run(
            [str(PROGRAM), *arguments],
            env=self.environment,
            cwd=self._servers.directory,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            raise ServerError(f"`outbox {' '.join(arguments)}` failed: {done.stderr}{done.stdout}")
        return done.stdout

    def fill(self, load: Load) -> None:
        """Write entries, past the writer's checks: it is not the writer that is measured."""
        load.fill(
            self.url,
            "outbox.entries",
            ("type", "key", "state"),
            ("'thing'", load.key_sql, f"convert_to({load.state_sql}, 'UTF8')"),
        )

    def begin(self) -> None:
        """Start the process."""
        self.mark()
        self._child = Child([str(PROGRAM), "relay"], log=self._log, cwd=self._servers.directory, env=self.environment)

    def end(self) -> None:
        """Stop the process in order."""
        child, self._child = self._child, None
        if child is None:
            return
        in_order = child.stop(seconds=STOP_SECONDS)
        if not in_order or child.exit_code() != 0:
            raise ServerError(f"The relay did not stop in order (exit code {child.exit_code()}):\n{tail(self._log)}")

    def check_alive(self) -> None:
        """It has not ended."""
        if self._child is not None and (code := self._child.exit_code()) is not None:
            raise ServerError(f"The relay ended by itself (exit code {code}); the end of its log:\n{tail(self._log)}")

    def close(self) -> None:
        """Kill it if it runs."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(seconds=0)

    @property
    def pids(self) -> Mapping[str, int]:
        """The relay's process."""
        return {"relay": self._child.pid} if self._child is not None else {}

    @property
    def trees(self) -> Mapping[str, int]:
        """Its PostgreSQL server, and the broker."""
        return {"PostgreSQL": self.postgres.pid, "Kafka": self._servers.kafka.pid}

    @property
    def insert(self) -> str:
        """As the Python writer has it, but for its checks."""
        return "INSERT INTO outbox.entries (type, key, state) VALUES ('thing', %s, convert_to(%s, 'UTF8'))"

    @property
    def versions(self) -> Mapping[str, str]:
        """Its own; those of its libraries are the benchmarks' own."""
        return {"outbox": __version__}

    def mark(self) -> None:
        """Leave out of `events` and `details` what it has logged so far."""
        self._told = self._log.stat().st_size if self._log.exists() else 0

    def events(self, name: str) -> Iterator[Mapping[str, Any]]:
        """The events of this kind that it has logged since it began, or since the mark."""
        with self._log.open("rb") as log:
            log.seek(self._told)
            for line in log:
                if line.startswith(b"{"):
                    event = json.loads(line)
                    if event.get("event") == name:
                        yield event

    def done(self, load: Load, added: int) -> bool:
        """By its own count: of collapsed entries the topic tells nothing."""
        return added > 0 and sum(event["entries"] for event in self.events("relay.published")) >= load.entries

    def details(self) -> Mapping[str, float]:
        """Transactions, entries, and the seconds that it spent in each of its steps."""
        sums: dict[str, float] = {"transactions": 0}
        for event in self.events("relay.published"):
            sums["transactions"] += 1
            for field, value in event.items():
                if field in {"entries", "records"} or field.endswith("_seconds"):
                    sums[field] = sums.get(field, 0) + value
        return sums
