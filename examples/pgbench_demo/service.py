"""The owning service: stock pgbench, its own tables and its own script. Nothing here knows of the outbox."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from devstack.postgres import Postgres
from devstack.processes import Child, ServerError, tail

DATABASE = "bank"


@dataclass(frozen=True)
class Published:
    """A table of the service, and the entity type and topic that it is published as. `key` is its primary key."""

    table: str
    key: str
    type: str
    topic: str


TABLES: Sequence[Published] = (
    Published("pgbench_accounts", "aid", "account", "bank.account"),
    Published("pgbench_tellers", "tid", "teller", "bank.teller"),
    Published("pgbench_branches", "bid", "branch", "bank.branch"),
)
"""The fourth table, pgbench_history, has no key: its rows are no entities."""

CLIENTS = Published("client", "cid", "client", "bank.client")
"""A table of the service that is there, with its rows, long before anybody publishes it; pgbench does not touch it."""
CLIENT_ROWS = 50_000


class Pgbench:
    """pgbench against one database, with its output in `directory`. Raises `ServerError` with what it wrote."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._directory = directory

    def make_tables(self, scale: int, *, seconds: float = 120) -> None:
        """Make its tables, with 100,000 accounts, ten tellers and one branch for each unit of the scale."""
        child = self._start("init", "--initialize", "--quiet", f"--scale={scale}")
        try:
            if not child.wait(seconds):
                raise ServerError(f"pgbench has not made its tables in {seconds:g} s.")
        finally:
            child.stop()
        self.check("init", child)

    def make_clients(self) -> None:
        """Make the table of the service's that is published later."""
        with psycopg.connect(self._url) as connection:
            connection.execute("CREATE TABLE client (cid int PRIMARY KEY, name text NOT NULL, since int NOT NULL)")
            connection.execute(
                "INSERT INTO client SELECT n, 'client ' || n, 2000 + n %% 25 FROM generate_series(1, %s) n",
                [CLIENT_ROWS],
            )

    def start(self, *, clients: int, seconds: int) -> Child:
        """Start its built-in TPC-B script: each transaction changes one account, one teller and one branch."""
        return self._start(
            "run",
            f"--client={clients}",
            f"--jobs={min(2, clients)}",
            f"--time={seconds}",
            # Not VACUUM of its tables first, which is right after they were made.
            "--no-vacuum",
        )

    def check(self, what: str, child: Child) -> None:
        """Refuse a pgbench that ended with an error."""
        code = child.exit_code()
        if code != 0:
            raise ServerError(f"pgbench failed (exit code {code}):\n{tail(self._log(what))}")

    def transactions(self) -> tuple[int, float]:
        """How many transactions the run has committed, and how many a second."""
        written = self._log("run").read_text(errors="replace")
        count = re.search(r"^number of transactions actually processed: (\d+)", written, re.MULTILINE)
        rate = re.search(r"^tps = ([\d.]+)", written, re.MULTILINE)
        if count is None or rate is None:
            raise ServerError(f"pgbench reported no transactions:\n{tail(self._log('run'))}")
        return int(count[1]), float(rate[1])

    def _log(self, what: str) -> Path:
        return self._directory / f"pgbench-{what}.log"

    def _start(self, what: str, *arguments: str) -> Child:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        command = [Postgres.bin("pgbench"), *arguments, self._url]
        return Child(command, log=self._log(what), cwd=self._directory, env=environment | {"LC_ALL": "C"})
