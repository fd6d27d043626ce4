"""All of it: three services with a database each, two relays, Kafka; each can be stopped and started, in any order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from devstack.processes import Child, ServerError, free_port, tail
from marketplace.http import get

EXAMPLES = Path(__file__).resolve().parent.parent
PROGRAM = Path(sys.executable)
OUTBOX = PROGRAM.with_name("outbox")
_START_SECONDS = 60.0
OWNERS = ("adverts", "users")
PARTS = ("kafka", "adverts", "users", "relay-adverts", "relay-users", "search")
"""What can be stopped and started."""


class Part(Protocol):
    """Something that runs, or does not."""

    def start(self) -> None:
        """Start it, if it does not run; whether what it needs runs is its own affair."""

    def stop(self) -> None:
        """Kill it at once."""

    @property
    def running(self) -> bool:
        """Whether it runs."""


@dataclass
class Program:
    """A process of ours."""

    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    child: Child | None = None

    def start(self) -> None:
        """See `Part`."""
        if not self.running:
            self.child = Child(list(self.command), log=self.log, env=self.env, cwd=EXAMPLES)

    def stop(self) -> None:
        """See `Part`."""
        if self.child is not None:
            self.child.stop(seconds=0)
            self.child = None

    @property
    def running(self) -> bool:
        """See `Part`."""
        child = self.child  # another thread may stop it just now
        return child is not None and child.exit_code() is None


@dataclass
class Service:
    """A service and its database: they go and come together. `health`: where it says that it is well."""

    program: Program
    database: Postgres
    health: str
    migrate: Callable[[], None]
    _made: bool = field(default=False)

    def start(self) -> None:
        """See `Part`."""
        if not self.database.running:
            self.database.start()
        if not self._made:
            self.migrate()
            self._made = True
        self.program.start()
        deadline = time.monotonic() + _START_SECONDS
        while get(self.health, seconds=1) is None:
            if not self.program.running or time.monotonic() > deadline:
                raise ServerError(f"{self.program.log.stem} does not answer:\n{tail(self.program.log)}")
            time.sleep(0.05)

    def stop(self) -> None:
        """See `Part`."""
        self.program.stop()
        if self.database.running:
            self.database.stop("immediate")

    @property
    def running(self) -> bool:
        """See `Part`."""
        return self.program.running and self.database.running


@dataclass
class Broker:
    """Kafka."""

    kafka: Kafka

    def start(self) -> None:
        """See `Part`."""
        if not self.kafka.running:
            self.kafka.start()

    def stop(self) -> None:
        """See `Part`."""
        self.kafka.kill()

    @property
    def running(self) -> bool:
        """See `Part`."""
        return self.kafka.running


class Market:
    """Everything, in a directory of its own. As a context manager it starts, and ends all that it started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        # Of each part its own: one that takes long to start, or cannot, keeps no other from being stopped. Parts share
        # nothing that changes: ports, directories and environments are given here.
        self._locks = {name: threading.Lock() for name in PARTS}
        self.kafka = Kafka(directory / "kafka")
        small = {"shared_buffers": "64MB", "synchronous_commit": "on"}
        self.databases = {name: Postgres(directory / name, options=small) for name in (*OWNERS, "search")}
        self.ports = {name: free_port() for name in (*OWNERS, "search")}
        self.parts: dict[str, Part] = {"kafka": Broker(self.kafka)}
        for name in (*OWNERS, "search"):
            program = self._program(name, [str(PROGRAM), "-m", f"marketplace.{name}.service"])
            self.parts[name] = Service(program, self.databases[name], f"{self.url(name)}/health", self._migration(name))
        for name in OWNERS:
            self.parts[f"relay-{name}"] = self._program(name, [str(OUTBOX), "relay"], log=f"relay-{name}")

    def __enter__(self) -> Self:
        try:
            for name in PARTS:
                self._stack.callback(self.stop, name)
                self.start(name)
                if name == "users":
                    # Once there are types and a broker, the topics can be made.
                    for owner in OWNERS:
                        self.run([str(OUTBOX), "topics", "apply", "--yes"], self.environment(owner))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        """Start one of `PARTS`, and wait until it answers; `ServerError` says why it does not."""
        with self._locks[name]:
            self.parts[name].start()

    def stop(self, name: str) -> None:
        """Kill one of `PARTS`, as a power cut would; while it is being started, once that is over."""
        with self._locks[name]:
            self.parts[name].stop()

    def running(self) -> dict[str, bool]:
        """Which of them run."""
        return {name: self.parts[name].running for name in PARTS}

    def environment(self, name: str) -> dict[str, str]:
        """What a service's processes are given."""
        url = self.databases[name].url()
        own = {key: value for key, value in os.environ.items() if not key.startswith("OUTBOX_")}
        return own | {
            "OUTBOX_DATABASE_URL": url,
            "SEARCH_DATABASE_URL": url,
            "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "OUTBOX_REPLICATION_FACTOR": "1",
            "PORT": str(self.ports[name]),
            "PYTHONPATH": str(EXAMPLES),
        }

    def url(self, name: str) -> str:
        """Where a service answers."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def _program(self, name: str, command: Sequence[str], *, log: str | None = None) -> Program:
        self.directory.mkdir(parents=True, exist_ok=True)
        return Program(command, self.environment(name), self.directory / f"{log or f'{name}-service'}.log")

    def _migration(self, name: str) -> Callable[[], None]:
        config = EXAMPLES / "marketplace" / name / "alembic.ini"
        command = [str(PROGRAM), "-m", "alembic", "-c", str(config), "upgrade", "head"]
        return lambda: self.run(command, self.environment(name))

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Run a command to its end."""
        done = subprocess.run(
            list(command), env=dict(env), cwd=EXAMPLES, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"`{' '.join(command)}` failed: {done.stderr}{done.stdout}")
