"""Patience: how long a call to the database may go unanswered.

A server may be frozen, or hold a lock for ever, and its kernel still acknowledges every packet: neither a time limit of
the server's nor one of TCP's ends such a call. So a thread watches the calls of one connection, and cuts it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg

from outbox.database import Connection

_LOOK_SECONDS = 0.25
_CANCEL_SECONDS = 1.0


class Patience:
    """Watches the calls of one thread, one at a time.

    A call that takes longer than `seconds`, or that is under way `grace` seconds after `stop()` came true, is
    cancelled; if that does not help, its connection is cut. `close` ends the watching; the next call begins it anew.
    """

    def __init__(self, seconds: float, *, stop: Callable[[], bool], grace: float = 2.0) -> None:
        self._seconds = seconds
        self._stop = stop
        self._grace = grace
        self._lock = threading.Lock()
        self._call: tuple[Connection, float] | None = None
        self._watching: threading.Event | None = None

    @contextmanager
    def call(self, connection: Connection) -> Iterator[None]:
        """Watch what happens inside."""
        if self._watching is None:
            self._watching = threading.Event()
            threading.Thread(target=self._watch, args=(self._watching,), name="outbox-patience", daemon=True).start()
        # Nobody is woken for it: most calls are over before the next look.
        self._call = (connection, time.monotonic() + self._seconds)
        try:
            yield
        finally:
            with self._lock:
                self._call = None

    def close(self) -> None:
        """Watch no longer."""
        if self._watching is not None:
            self._watching.set()
            self._watching = None

    def _watch(self, over: threading.Event) -> None:
        stopped_at: float | None = None
        while not over.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if stopped_at is None and self._stop():
                stopped_at = now
            call = self._call
            if call is not None and (now > call[1] or (stopped_at is not None and now > stopped_at + self._grace)):
                self._end(call, over)

    def _end(self, call: tuple[Connection, float], over: threading.Event) -> None:
        connection = call[0]
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=_CANCEL_SECONDS)
        over.wait(_CANCEL_SECONDS)
        with self._lock:
            if self._call is not call or connection.closed:
                return
            with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)
