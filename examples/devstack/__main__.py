"""`python -m devstack up|down|status`: keep one PostgreSQL and one Kafka running for a person.

The servers outlive the command. What runs where is in `.stack/run/state.json`: an object with `boot` (which
boot of the machine the process ids belong to) and, for `postgres` and `kafka`, `pid`, `started` (tells the
process from a later one of the same id), `port`, `url` (Kafka's: its bootstrap servers), `log` and
`directory`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from devstack.install import STACK
from devstack.kafka import Kafka
from devstack.postgres import Postgres
from devstack.processes import Identity, ServerError, boot_id

DATABASE = "app"
NOT_RUNNING = 3
"""Exit code of `status` when not both servers run, as init scripts have it."""

Server = Postgres | Kafka


@dataclass(frozen=True)
class Service:
    """One recorded server."""

    pid: int
    started: str
    """As `devstack.processes.start_time` gives it."""
    port: int
    url: str
    """What a client connects to: a libpq URL, or Kafka's bootstrap servers."""
    log: str
    directory: str

    @property
    def identity(self) -> Identity:
        """The process, whether or not it still runs."""
        return Identity(self.pid, self.started)


@dataclass
class State:
    """The recorded servers, by name (`postgres`, `kafka`)."""

    path: Path
    services: dict[str, Service]

    @classmethod
    def read(cls, directory: Path) -> State:
        """The state, without servers of an earlier boot or that have ended since.

        Raises `ServerError` when the file is damaged: guessing could leave servers behind or end others.
        """
        path = directory / "state.json"
        services: dict[str, Service] = {}
        try:
            stored = json.loads(path.read_text())
            if stored["boot"] == boot_id():
                services = {name: Service(**fields) for name, fields in stored["services"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServerError(
                f"{path} cannot be read ({error!r}): end the servers whose data is below {directory}, "
                "if they still run, and remove that directory."
            ) from error
        return cls(path, {name: service for name, service in services.items() if service.identity.alive()})

    def write(self) -> None:
        """Replace the file as a whole; without servers, remove it."""
        if not self.services:
            self.path.unlink(missing_ok=True)
            return
        stored = {"boot": boot_id(), "services": {name: asdict(one) for name, one in self.services.items()}}
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(stored, indent=2) + "\n")
        unfinished.rename(self.path)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Let one command at a time change the servers of this directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def record(server: Server) -> Service:
    """What to keep about a launched server."""
    identity = server.child.identity
    url = server.url(DATABASE) if isinstance(server, Postgres) else server.bootstrap
    return Service(identity.pid, identity.started, server.port, url, str(server.log), str(server.directory))


def make_database(server: Postgres) -> None:
    """Create the database that the printed URL names; nothing happens when it is there."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        there = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
        if there is None:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))


def up(directory: Path) -> tuple[State, list[str]]:
    """Start what does not run; the state, and the names of what was started.

    On a failure, what was started is stopped again, and `ServerError` raised.
    """
    state = State.read(directory)
    makers: dict[str, Callable[[], Server]] = {
        "postgres": lambda: Postgres(directory / "postgres", tied=False),
        "kafka": lambda: Kafka(directory / "kafka", tied=False),
    }
    started: dict[str, Server] = {}
    try:
        for name, make in makers.items():
            if name not in state.services:
                started[name] = make()
                started[name].launch()
                # At once: whatever becomes of this command, `down` knows the process.
                state.services[name] = record(started[name])
                state.write()
        for server in started.values():
            server.wait_ready()
            if isinstance(server, Postgres):
                make_database(server)
    except BaseException:
        for name, server in started.items():
            server.stop()
            state.services.pop(name, None)
        state.write()
        raise
    for server in started.values():
        server.child.release()
    return state, list(started)


def down(directory: Path, *, keep: bool) -> list[str]:
    """Stop the recorded servers, and remove their data unless `keep`; the names of what was stopped."""
    state = State.read(directory)
    stopped = []
    for name, number in (("kafka", signal.SIGTERM), ("postgres", signal.SIGINT)):
        service = state.services.pop(name, None)
        if service is not None:
            service.identity.stop(number, seconds=60)
            stopped.append(name)
            state.write()
    state.write()
    if not keep:
        for name in ("kafka", "postgres"):
            shutil.rmtree(directory / name, ignore_errors=True)
    return stopped


def show(state: State, *, as_json: bool) -> None:
    """Print what runs, and the lines that point the command line at it."""
    if as_json:
        both: dict[str, dict[str, object]] = {}
        for name in ("postgres", "kafka"):
            service = state.services.get(name)
            both[name] = {"running": service is not None} | ({} if service is None else asdict(service))
        print(json.dumps(both, indent=2))
        return
    for name, label in (("postgres", "PostgreSQL"), ("kafka", "Kafka")):
        service = state.services.get(name)
        if service is None:
            print(f"{label:<10} not running")
        else:
            print(f"{label:<10} {service.url}   process {service.pid}, log {service.log}")
    if len(state.services) == 2:
        print(f"\nexport OUTBOX_DATABASE_URL={state.services['postgres'].url}")
        print(f"export OUTBOX_KAFKA_BOOTSTRAP_SERVERS={state.services['kafka'].url}")


def main(arguments: list[str] | None = None) -> int:
    """Parse, act, print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m devstack", description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=STACK / "run", help="where the servers' data is")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("up", "start both servers"), ("status", "say what runs")):
        command = commands.add_parser(name, help=what)
        command.add_argument("--json", action="store_true", help="print an object for scripts")
    command = commands.add_parser("down", help="stop both servers and remove their data")
    command.add_argument("--keep", action="store_true", help="keep the data for the next `up`")
    chosen = parser.parse_args(arguments)
    directory: Path = chosen.directory.absolute()
    try:
        with exclusive(directory):
            if chosen.command == "up":
                state, started = up(directory)
                if not chosen.json:
                    print(f"Started: {', '.join(started)}." if started else "Already up.")
                show(state, as_json=chosen.json)
            elif chosen.command == "down":
                stopped = down(directory, keep=chosen.keep)
                print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")
            else:
                state = State.read(directory)
                show(state, as_json=chosen.json)
                return 0 if len(state.services) == 2 else NOT_RUNNING
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
