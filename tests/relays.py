"""The relay as a user runs it: its own process, by the installed command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
OUTBOX = Path(sys.executable).with_name("outbox")


def environment(url: str, bootstrap: str, **settings: object) -> dict[str, str]:
    """The environment of a relay or command; settings by their names, in lower case."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    named = {f"OUTBOX_{name.upper()}": str(value) for name, value in settings.items()}
    return {
        **own,
        "OUTBOX_DATABASE_URL": url,
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
        "OUTBOX_REPLICATION_FACTOR": "1",
        "OUTBOX_LOG_FORMAT": "json",
        **named,
    }


def outbox(env: Mapping[str, str], *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line to its end."""
    return subprocess.run(
        [str(OUTBOX), *arguments], env=dict(env), capture_output=True, text=True, timeout=seconds, check=False
    )


def must(env: Mapping[str, str], *arguments: str, seconds: float = 60) -> str:
    """Run a command that must succeed; its standard output."""
    done = outbox(env, *arguments, seconds=seconds)
    assert done.returncode == 0, f"outbox {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def eventually(look: Callable[[], T | None], *, seconds: float = 60, what: str = "it") -> T:
    """Look until something is there; what was found."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)


@dataclass
class RelayProcess:
    """An `outbox relay` that runs until the block ends; its log is kept."""

    env: Mapping[str, str]
    log: Path
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    _starts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start it (again); the log goes on."""
        self._starts = self._said_to_have_started()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(OUTBOX), "relay", *self.arguments], env=dict(self.env), stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, wherever it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def stop(self, *, seconds: float = 30) -> int:
        """End it in order; the exit code."""
        # Until it says so, Python is still importing, and the signal just ends it.
        eventually(lambda: self.process.poll() is not None or self._said_to_have_started() > self._starts)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def _said_to_have_started(self) -> int:
        return self.log.read_text().count('"relay.started"') if self.log.exists() else 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def wait_event(self, name: str, *, seconds: float = 60, count: int = 1) -> dict[str, Any]:
        """Wait until it has logged an event so many times; the last of them."""

        def found() -> dict[str, Any] | None:
            those = [event for event in self.events if event.get("event") == name]
            assert self.process.poll() is None or len(those) >= count, (
                f"the relay ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}"
            )
            return those[count - 1] if len(those) >= count else None

        return eventually(found, seconds=seconds, what=f"event {name}")
