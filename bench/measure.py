"""What processes used, from /proc, and how figures of several rounds are summed up."""

from __future__ import annotations

import contextlib
import os
import select
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from devstack.processes import Child, ServerError, children

Item = TypeVar("Item")

_TICKS = os.sysconf("SC_CLK_TCK")
_FOLLOW_SECONDS = 0.05
_REAP_SECONDS = 30
# Not every kernel lists a process's children; where it does, nobody else's processes need be looked at.
_LISTED = Path(f"/proc/self/task/{os.getpid()}/children").exists()


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time, seconds of one core, and the greatest resident memory, bytes, of one or several processes."""

    cpu_seconds: float = 0.0
    peak_bytes: int = 0


def _cpu(pid: int, *, with_ended_children: bool) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # utime, stime, cutime, cstime are the fields 14 to 17; the first one here is field 3.
    return sum(map(int, fields[11 : 15 if with_ended_children else 13])) / _TICKS


def _memory(pid: int, field: str) -> int:
    """Bytes: `VmRSS`, what is resident now, or `VmHWM`, its peak; 0 of a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def _children(pid: int) -> list[int]:
    if not _LISTED:
        return [child.pid for child in children(pid)]
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # A thread that has just ended has left its children to another one.
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it; each before its children, so that none is counted twice as it ends."""
    return [pid, *(one for child in _children(pid) for one in _tree(child))]


def usage(pid: int) -> Usage:
    """What one process has used since it began, without its children; nothing when it is gone."""
    return Usage(_cpu(pid, with_ended_children=False), _memory(pid, "VmHWM"))


def tree_cpu(pid: int) -> float:
    """CPU seconds of a process, of all that descend from it, and of those that have ended: a whole server, say."""
    return sum(_cpu(one, with_ended_children=True) for one in _tree(pid))


def tree_usage(pid: int) -> Usage:
    """The CPU of a process and of its descendants, ended ones too, and the memory that is theirs now, summed.

    Pages that they share are counted for each of them. It is no less than the peak of any one of them.
    """
    tree = _tree(pid)
    cpu = sum(_cpu(one, with_ended_children=True) for one in tree)
    together = sum(_memory(one, "VmRSS") for one in tree)
    return Usage(cpu, max(together, *(_memory(one, "VmHWM") for one in tree)))


def run_measured(child: Child, *, seconds: float, what: str) -> tuple[float, Usage]:
    """Wait for a child that ends by itself; how long it took, and what it and its descendants used.

    The CPU is read when it has ended, and has in it whom it has waited for. The memory is looked at every 0.05 s: the
    greatest sum that was seen (see `tree_usage`). Raises `ServerError` when it fails or takes longer than `seconds`;
    then it is ended.
    """
    began = time.monotonic()
    cpu, peak, ended = 0.0, 0, False
    # Told of its end, nobody has waited for it yet: what it used can still be read.
    told = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(told, select.POLLIN)
        while not ended:
            ended = bool(poll.poll(_FOLLOW_SECONDS * 1000))
            took = time.monotonic() - began
            now = tree_usage(child.pid)
            cpu, peak = max(cpu, now.cpu_seconds), max(peak, now.peak_bytes)
            if not ended and took > seconds:
                child.stop(seconds=0)
                raise ServerError(f"{what} took longer than {seconds:g} s and was ended.")
    finally:
        os.close(told)
    child.wait(_REAP_SECONDS)
    if child.exit_code() != 0:
        raise ServerError(f"{what} failed (exit code {child.exit_code()}).")
    return took, Usage(cpu, peak)


@dataclass
class Meter:
    """CPU seconds of long-lived processes since this object was made, by name. `trees` counts their children too."""

    pids: Mapping[str, int]
    trees: Mapping[str, int] = field(default_factory=dict)
    _before: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        own = {name: usage(pid).cpu_seconds for name, pid in self.pids.items()}
        return own | {name: tree_cpu(pid) for name, pid in self.trees.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """By name."""
        return {name: now - self._before[name] for name, now in self._now().items()}

    def peak_bytes(self) -> int:
        """Of the processes together, without the trees."""
        return sum(usage(pid).peak_bytes for pid in self.pids.values())


@dataclass(frozen=True, slots=True)
class Spread:
    """Figures of several rounds."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of some values; at least one."""
        return cls(min(values), statistics.median(values), max(values))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share (0 to 1) of the ordered values does not exceed; nan when there are none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def turned(items: Sequence[Item], number: int) -> list[Item]:
    """The same in another order in each round: neither who comes first must tell, nor who comes after whom.

    Begun with the next one, and backwards in every other round.
    """
    place = number % len(items) if items else 0
    order = [*items[place:], *items[:place]]
    return order if number % 2 == 0 else order[::-1]


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str, pause: float = 0.05) -> None:
    """Ask until it holds; `ServerError` when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{what} did not happen in {seconds:g} s.")
        time.sleep(pause)
