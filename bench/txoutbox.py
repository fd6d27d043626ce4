"""The contender in Python, `txoutbox`: it claims, publishes and deletes rows; at least once, without transactions."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import psycopg

from bench import install
from bench.servers import Servers
from bench.workload import Load, run
from devstack.processes import Child, ServerError, tail

_SCRIPT = install.HERE / "txoutbox_relay.py"
STOP_SECONDS = 60.0


class Txoutbox:
    """`processes` of it on one table, with its best settings for throughput; `notify`: woken by its own trigger."""

    exactly_once = False
    collapses = False

    def __init__(self, servers: Servers, *, processes: int = 1, notify: bool = False) -> None:
        self.name = f"txoutbox, {processes} process{'' if processes == 1 else 'es'}"
        self._id = f"txoutbox-{processes}"
        self.topic = f"bench.{self._id}"
        self._servers = servers
        self._processes = processes
        self._notify = notify
        self.postgres = servers.postgres(f"postgres-{self._id}")
        self.url = servers.database(self.postgres, "bench")
        self._log = servers.directory / f"{self._id}.log"
        self._children: list[Child] = []

    def _command(self, **more: Any) -> list[str]:
        settings = {"url": self.url, "bootstrap": self._servers.kafka.bootstrap, "notify": self._notify, **more}
        # -P: the script's directory holds a module of the same name as the package.
        return [str(install.PYTHON), "-P", str(_SCRIPT), json.dumps(settings)]

    def prepare(self) -> None:
        """Install it; make its table and topic."""
        install.python_packages()
        shown = subprocess.run(self._command(schema_only=True), capture_output=True, text=True, timeout=60, check=False)
        if shown.returncode != 0:
            raise ServerError(f"txoutbox failed:\n{shown.stderr}")
        with psycopg.connect(self.url) as connection:
            run(connection, shown.stdout)
        self._servers.topics.make(self.topic, settings={"cleanup.policy": "compact"})

    def fill(self, load: Load) -> None:
        """Write rows."""
        load.fill(
            self.url,
            "outbox",
            ("topic", "key", "payload"),
            (f"'{self.topic}'", load.key_sql, f"convert_to({load.state_sql}, 'UTF8')"),
        )

    def begin(self) -> None:
        """Start its processes."""
        self._children = [
            Child(self._command(), log=self._log, cwd=self._servers.directory) for _ in range(self._processes)
        ]

    def end(self) -> None:
        """Stop them in order."""
        children, self._children = self._children, []
        # Every one of them is stopped, whatever came of those before it.
        in_order = [child.stop(seconds=STOP_SECONDS) and child.exit_code() == 0 for child in children]
        if not all(in_order):
            raise ServerError(f"txoutbox did not stop in order:\n{tail(self._log)}")

    def check_alive(self) -> None:
        """None of its processes has ended."""
        codes = [code for child in self._children if (code := child.exit_code()) is not None]
        if codes:
            raise ServerError(
                f"txoutbox ended by itself (exit code {codes[0]}); the end of its log:\n{tail(self._log)}"
            )

    def close(self) -> None:
        """Kill what runs."""
        children, self._children = self._children, []
        for child in children:
            child.stop(seconds=0)

    @property
    def pids(self) -> Mapping[str, int]:
        """Its processes."""
        return {f"txoutbox {number}": child.pid for number, child in enumerate(self._children, 1)}

    @property
    def trees(self) -> Mapping[str, int]:
        """Its PostgreSQL server, and the broker."""
        return {"PostgreSQL": self.postgres.pid, "Kafka": self._servers.kafka.pid}

    @property
    def insert(self) -> str:
        """As its own `insert` has it, without headers."""
        return f"INSERT INTO outbox (topic, key, payload) VALUES ('{self.topic}', %s, convert_to(%s, 'UTF8'))"

    @property
    def versions(self) -> Mapping[str, str]:
        """Itself, and the clients that it uses."""
        return install.locked("txoutbox", "aiokafka", "asyncpg")

    def done(self, load: Load, added: int) -> bool:
        """A record for each row."""
        return added >= load.entries

    def details(self) -> Mapping[str, float]:
        """It tells nothing."""
        return {}
