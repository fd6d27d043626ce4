"""The outbox beside the service: made, given its entity types, capturing the tables, and published by the relay."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import NullPool, create_engine, make_url

import outbox.operations
from devstack.processes import Child, ServerError, tail
from pgbench_demo.service import Published

assert outbox.operations  # registers op.outbox_create and its sisters

NAME = "bank"
"""The outbox's name, which its own topics and its transactional id begin with."""

STOP_SECONDS = 20.0


class Publishing:
    """The installed command `outbox` against the demo's servers; failures raise `ServerError` with what it wrote."""

    def __init__(self, url: str, bootstrap: str, directory: Path) -> None:
        self._url = url
        # Neither the environment's settings nor an outbox.toml of where the demo was called must get in.
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")} | {
            "OUTBOX_DATABASE_URL": url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
            "OUTBOX_REPLICATION_FACTOR": "1",
        }
        self._directory = directory
        self._log = directory / "relay.log"
        self._relay: Child | None = None
        self._code = 0

    def make(self, tables: Sequence[Published]) -> None:
        """Make the outbox, its entity types and their topics, and capture the tables with the rows they have."""
        engine = create_engine(make_url(self._url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.begin() as connection:
            # What a service writes into a revision of its own, where `op` comes from `from alembic import op`.
            op: Any = Operations(MigrationContext.configure(connection))
            op.outbox_create(name=NAME)
            for table in tables:
                op.outbox_add_type(table.type, topic=table.topic)
                op.outbox_capture(table.table, type=table.type, key=(table.key,), existing_rows=True)
        self._run("topics", "apply", "--yes")

    # --- what was there before -------------------------------------------------------------------

    def capture_later(self, table: Published) -> None:
        """Capture another table, whose rows stay unpublished until they change; its type's source comes with it."""
        engine = create_engine(make_url(self._url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.begin() as connection:
            op: Any = Operations(MigrationContext.configure(connection))
            op.outbox_add_type(table.type, topic=table.topic)
            op.outbox_capture(table.table, type=table.type, key=(table.key,))
        self._run("topics", "apply", "--yes")

    def backfill(self, table: Published) -> str:
        """Publish the rows that were there before, with a bar on a terminal; what the command says."""
        return self._shown("backfill", "start", table.type, "--watch")

    def reconcile(self, table: Published, *, repair: bool = False) -> tuple[bool, str]:
        """Compare a topic with its table; whether it is equal, and what the command says."""
        arguments = ["reconcile", table.type, *(["--repair"] if repair else [])]
        said = self._shown(*arguments, codes=(0, 1))
        return self._code == 0, said

    # --- the relay -------------------------------------------------------------------------------

    def start_relay(self) -> None:
        """Start `outbox relay`, a process of its own."""
        self._relay = Child([str(_program()), "relay"], log=self._log, cwd=self._directory, env=self._environment)

    def check_relay(self) -> None:
        """Refuse a relay that has ended by itself."""
        if self._relay is not None and self._relay.exit_code() is not None:
            raise ServerError(f"The relay ended (exit code {self._relay.exit_code()}):\n{tail(self._log)}")

    def stop_relay(self) -> None:
        """Stop it in order, as a deployment would (SIGTERM), and see that it says all went well."""
        relay, self._relay = self._relay, None
        if relay is None:
            return
        in_order = relay.stop(seconds=STOP_SECONDS)
        if not in_order or relay.exit_code() != 0:
            raise ServerError(f"The relay did not stop in order (exit code {relay.exit_code()}):\n{tail(self._log)}")

    def drain(self) -> None:
        """Publish everything that is committed now."""
        self._run("relay", "--until-caught-up")

    def abandon(self) -> None:
        """End a relay that still runs, at once."""
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.stop(seconds=0)

    # --- inside ----------------------------------------------------------------------------------

    def _shown(self, *arguments: str, codes: Sequence[int] = (0,), seconds: float = 120) -> str:
        """Run a command as a person does, whose progress is drawn on the terminal; what it writes otherwise."""
        done = subprocess.run(
            [str(_program()), *arguments],
            env=self._environment,
            cwd=self._directory,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
            check=False,
        )
        self._code = done.returncode
        if done.returncode not in codes:
            raise ServerError(
                f"`outbox {' '.join(arguments)}` failed (exit code {done.returncode}):\n{done.stderr or ''}"
            )
        return done.stdout.strip()

    def _run(self, *arguments: str, seconds: float = 120) -> None:
        log = self._directory / "outbox.log"
        began = log.stat().st_size if log.exists() else 0
        child = Child([str(_program()), *arguments], log=log, cwd=self._directory, env=self._environment)
        try:
            ended = child.wait(seconds)
        finally:
            child.stop(seconds=0)
        if not ended or child.exit_code() != 0:
            how = f"exit code {child.exit_code()}" if ended else f"not done in {seconds:g} s"
            written = log.read_bytes()[began:].decode(errors="replace").rstrip()
            raise ServerError(f"`outbox {' '.join(arguments)}` failed ({how}):\n{written}")


def _program() -> Path:
    program = Path(sys.executable).with_name("outbox")
    if not program.is_file():
        raise ServerError("The command `outbox` is not installed beside this Python: run `make setup`.")
    return program
