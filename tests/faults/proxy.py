"""A TCP proxy that cuts, delays and swallows; for Kafka it knows one request from another."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from devstack.processes import LOOPBACK, free_port

END_TXN = 26
"""Kafka's number of the request that ends a transaction."""


@dataclass(eq=False)
class _Line:
    """A client's connection and the one behind it; `held` are bytes of a request that is not whole yet."""

    client: socket.socket
    server: socket.socket
    held: bytes = b""
    mute: bool = False
    dead: bool = field(default=False)

    def close(self) -> None:
        self.dead = True
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.close()


class Proxy:
    """Listens on `port` and passes on to `target`. What it does to the bytes can be changed at any time.

    - `cut()`: end every connection now; `accepting = False`: end new ones at once, too.
    - `silent = True`: accept and pass on nothing, either way.
    - `delay`: seconds that every piece waits.
    - `lose_answers = N`: of the next N requests that end a Kafka transaction, nothing that the broker says comes back,
      and the connection is cut a moment later; `lose_requests = N`: they do not even get to the broker.
    """

    def __init__(self, target: int, *, port: int | None = None, kafka: bool = False) -> None:
        self.target = target
        self.port = port or free_port()
        self.kafka = kafka
        self.accepting = True
        self.silent = False
        self.delay = 0.0
        self.lose_answers = 0
        self.lose_requests = 0
        self.lost = 0
        self._lines: list[_Line] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listener = socket.create_server((LOOPBACK, self.port), backlog=64)
        self._listener.settimeout(0.1)
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()
        self.cut()

    def cut(self) -> int:
        """End every connection now; how many there were."""
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            for end in (line.client, line.server):
                with contextlib.suppress(OSError):
                    # So that the client hears of it at once, in the middle of whatever it does.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            line.close()
        return len(lines)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            if not self.accepting:
                client.close()
                continue
            try:
                server = socket.create_connection((LOOPBACK, self.target), timeout=5)
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = _Line(client, server)
            with self._lock:
                self._lines.append(line)
            threading.Thread(target=self._pump, args=(line,), name=f"line-{self.port}", daemon=True).start()

    def _pump(self, line: _Line) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(line.client, selectors.EVENT_READ)
            selector.register(line.server, selectors.EVENT_READ)
            while not line.dead and not self._over.is_set():
                for key, _ in selector.select(0.05):
                    if self.silent:
                        time.sleep(0.01)
                        continue
                    piece = key.fileobj.recv(65_536)  # type: ignore[union-attr]  # both are sockets
                    if not piece:
                        return line.close()
                    if self.delay:
                        time.sleep(self.delay)
                    if key.fileobj is line.client:
                        self._from_client(line, piece)
                    elif not line.mute:
                        line.client.sendall(piece)
        return line.close()

    def _from_client(self, line: _Line, piece: bytes) -> None:
        if not self.kafka:
            line.server.sendall(piece)
            return
        line.held += piece
        while len(line.held) >= 6:
            size = 4 + int.from_bytes(line.held[:4], "big")
            if len(line.held) < size:
                return
            request, line.held = line.held[:size], line.held[size:]
            if int.from_bytes(request[4:6], "big") == END_TXN and (self.lose_answers or self.lose_requests):
                self._lose(line, request)
                return
            line.server.sendall(request)

    def _lose(self, line: _Line, request: bytes) -> None:
        if self.lose_answers:
            self.lose_answers -= 1
            line.mute = True
            line.server.sendall(request)
            # Long enough for the coordinator to have done it.
            time.sleep(0.3)
        else:
            self.lose_requests -= 1
        self.lost += 1
        line.close()
