"""Child processes that leave nothing behind, are stopped by their id only, and are known again later."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

LAUNCHER = Path(__file__).with_name("launch.py")
PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "stat").exists()
LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.02


class ServerError(RuntimeError):
    """A server of the development stack did not do what it was asked; the message says where its log is."""


# --- ports --------------------------------------------------------------------------------------

_given: set[int] = set()


def _ephemeral_floor() -> int:
    """The least port that the kernel may give to an outgoing connection."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


def port_is_free(port: int) -> bool:
    """Whether nothing listens on this TCP port of the loopback interface."""
    with socket.socket() as probe:
        # As servers do: connections of an earlier listener in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def ports_before(directory: Path) -> Mapping[str, int]:
    """The ports that `remember_ports` wrote for the server of this directory; empty when there are none."""
    try:
        return {str(name): int(port) for name, port in json.loads((directory / "ports.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def remember_ports(directory: Path, ports: Mapping[str, int]) -> None:
    """Note a server's ports, so that a later object on the same directory takes the same ones."""
    (directory / "ports.json").write_text(json.dumps(dict(ports)) + "\n")


def port_of(name: str, before: Mapping[str, int]) -> int:
    """The port that the directory had before, so that clients find it again; another when it is taken."""
    port = before.get(name)
    return port if port is not None and port_is_free(port) else free_port()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on; never the same one twice in a process.

    It lies below the range of outgoing connections where there is room: in that range, a client that tries
    to reconnect to a stopped server may be given the server's own port, and the server cannot come back.
    """
    floor = _ephemeral_floor()
    if floor >= 12000:
        choose = random.SystemRandom()
        for _ in range(1000):
            port = choose.randrange(10000, floor)
            if port not in _given and port_is_free(port):
                _given.add(port)
                return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = int(probe.getsockname()[1])
    _given.add(port)
    return port


# --- identity of a process ----------------------------------------------------------------------


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (index 0 = field 3), or None when there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command's name stands in parentheses and may itself hold spaces and parentheses.
    return text.rpartition(")")[2].split()


def start_time(pid: int) -> str | None:
    """What tells this process from a later one of the same id, or None when there is no such process.

    Linux: clock ticks since boot; elsewhere the date that `ps` prints. A zombie counts as gone.
    """
    if HAS_PROC:
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else fields[19]
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def boot_id() -> str:
    """Identifies this boot of the machine: process ids and start times mean nothing in another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Identity:
    """A process that can be found again, or found to be gone, from another process."""

    pid: int
    started: str
    """As `start_time` gives it."""

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The running process of this id, or None."""
        started = start_time(pid)
        return None if started is None else cls(pid, started)

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_time(self.pid) == self.started

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this very process; nothing happens when it is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM, *, seconds: float = 30) -> bool:
        """Send `number`, wait up to `seconds`, then kill and wait. True when it ended by itself."""
        self.send(number)
        if wait_until(lambda: not self.alive(), seconds=seconds):
            return True
        self.send(signal.SIGKILL)
        wait_until(lambda: not self.alive(), seconds=30)
        return False


def children(pid: int) -> list[Identity]:
    """The direct children of a process (Linux; an empty list elsewhere)."""
    found: list[Identity] = []
    if not HAS_PROC:
        return found
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields is not None and fields[0] not in "ZX" and int(fields[1]) == pid:
                found.append(Identity(int(entry.name), fields[19]))
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Ask `condition` again and again until it holds (True) or `seconds` have passed (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


# --- starting -----------------------------------------------------------------------------------


def server_user() -> str | None:
    """The unprivileged system user for a server that refuses to run as root, or None when we are not root."""
    return "nobody" if os.geteuid() == 0 else None


class _Spawner:
    """Starts every child from one thread that lives as long as this process.

    The kernel ties a child to the *thread* that started it: one started from a short-lived thread (a test's,
    a pool's) would be killed when that thread ends.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]]
        self._queue = SimpleQueue()
        threading.Thread(target=self._serve, name="devstack-spawner", daemon=True).start()

    def _serve(self) -> None:
        while True:
            call, future = self._queue.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised where the child was asked for
                future.set_exception(error)

    def spawn(self, call: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Run `call` in that thread and give back what it gives, or raise what it raises."""
        future: Future[subprocess.Popen[bytes]] = Future()
        self._queue.put((call, future))
        return future.result()


@functools.lru_cache(maxsize=1)
def _spawner_of(pid: int) -> _Spawner:  # noqa: ARG001 - a forked process needs its own thread
    return _Spawner()


def launch_command(
    command: Sequence[str], *, user: str | None, tied: bool, death_signal: signal.Signals = signal.SIGKILL
) -> list[str]:
    """`command` as run through the launcher (see `devstack/launch.py`)."""
    parent = os.getpid() if tied else 0
    return [
        sys.executable,
        *("-I", "-S", str(LAUNCHER), str(parent), str(int(death_signal)), user or "-"),
        *command,
    ]


class Child:
    """One started child process.

    `log` gets its standard output and error, appended. With `tied` (the default) the kernel sends
    `death_signal` to it when this process ends, however it ends; without, it outlives this process.
    `command[0]` is a path. Raises `OSError` when no process can be made.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        tied: bool = True,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        full = launch_command(command, user=user, tied=tied, death_signal=death_signal)
        with log.open("ab") as output:

            def spawn() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    full,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=None if env is None else dict(env),
                    # A session of its own: Ctrl-C in the terminal is for the person's command, which then
                    # stops its servers in order.
                    start_new_session=True,
                )

            self._process = _spawner_of(os.getpid()).spawn(spawn)
        self.pid = self._process.pid
        self.identity = Identity.of(self.pid) or Identity(self.pid, "gone")

    def exit_code(self) -> int | None:
        """None while it runs, then its exit code (negative = the signal that ended it)."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for its end; whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGTERM, *, seconds: float = 30) -> bool:
        """Send `number`, wait up to `seconds`, then kill and wait. True when it ended by itself."""
        self.send(number)
        if self.wait(seconds):
            return True
        self.send(signal.SIGKILL)
        self._process.wait()
        return False

    def release(self) -> None:
        """Let go of a child that is meant to outlive this process: no warning when this object is dropped."""
        if self._process.returncode is None:
            self._process.returncode = 0


def tail(log: Path, lines: int = 30) -> str:
    """The last `lines` lines of a log, indented, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"    (no log: {os.strerror(error.errno or errno.EIO)})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (the log is empty)"
