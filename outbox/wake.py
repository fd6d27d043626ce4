"""Wake: ends a wait from another thread or a signal handler."""

from __future__ import annotations

import select
import socket


class Wake:
    """Set once, for good; whoever waits, waits no longer.

    A flag and a pair of sockets, no lock: a signal handler runs within the very wait that it is to end.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.settimeout(0)
        self._set = False

    def fileno(self) -> int:
        """Readable once it is set: for a wait that also waits for something else."""
        return self._reader.fileno()

    def set(self) -> None:
        """End this wait and every later one."""
        self._set = True
        try:
            self._writer.send(b"x")
        except OSError:
            return  # full or closed: whoever waits has been told

    @property
    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; whether it is set."""
        if not self._set:
            select.select([self._reader], [], [], seconds)
        return self._set

    def close(self) -> None:
        """Give the descriptors back."""
        self._reader.close()
        self._writer.close()
