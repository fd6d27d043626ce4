"""A TCP proxy that cuts, delays and swallows; for Kafka it knows one request from another."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from devstack.processes import LOOPBACK, free_port

Loses = Literal["answers", "requests"]

END_TXN = 26
"""Kafka's number of the request that ends a transaction."""


@dataclass(eq=False)
class _Line:
    """A client's connection and the one behind it; `held` are bytes of a request that is not whole yet.

    `waits_for` is the number of a request whose answer is to be lost, `answers` what came of it so far.
    """

    client: socket.socket
    server: socket.socket
    held: bytes = b""
    waits_for: bytes | None = None
    answers: bytes = b""
    dead: bool = field(default=False)

    def reset(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                # So that the client hears of it at once, in the middle of whatever it does.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.close()

    def close(self) -> None:
        self.dead = True
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.close()


class Proxy:
    """Listens on `port` and passes on to `target`. What it does to the bytes can be changed at any time.

    - `cut()`: end every connection now. `cuts_within = N`: end the one on which the server answers with N bytes or more
      at once, after the first half of them; once, and `cuts` counts it.
    - `silent = True`: accept and pass on nothing, either way.
    - `delay`: seconds that every piece waits.
    - `loses = "answers"`: what the broker answers to a request that ends a Kafka transaction does not come back: the
      connection is cut instead. `loses = "requests"`: they do not even get to the broker. `lost` counts both.
    """

    def __init__(self, target: int, *, port: int | None = None, kafka: bool = False) -> None:
        self.target = target
        self.port = port or free_port()
        self.kafka = kafka
        self.cuts_within: int | None = None
        self.cuts = 0
        self.silent = False
        self.delay = 0.0
        self.loses: Loses | None = None
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
            line.reset()
        return len(lines)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
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
                    else:
                        self._from_server(line, piece)
        return line.close()

    def _from_client(self, line: _Line, piece: bytes) -> None:
        if not self.kafka:
            line.server.sendall(piece)
            return
        requests, line.held = _split(line.held + piece)
        for request in requests:
            if int.from_bytes(request[4:6], "big") == END_TXN and self.loses == "requests":
                self.lost += 1
                line.close()
                return
            if int.from_bytes(request[4:6], "big") == END_TXN and self.loses == "answers":
                line.waits_for = request[8:12]
            line.server.sendall(request)

    def _from_server(self, line: _Line, piece: bytes) -> None:
        if self.cuts_within is not None and len(piece) >= self.cuts_within:
            self.cuts_within, self.cuts = None, self.cuts + 1
            line.client.sendall(piece[: len(piece) // 2])
            line.reset()
            return
        if line.waits_for is None:
            line.client.sendall(piece)
            return
        # The coordinator's line is quiet but for this: what comes now begins an answer.
        answers, line.answers = _split(line.answers + piece)
        for answer in answers:
            if answer[4:8] == line.waits_for:
                # It is done: the broker would not answer before.
                self.lost += 1
                line.close()
                return
            line.client.sendall(answer)


def _split(held: bytes) -> tuple[list[bytes], bytes]:
    """The whole messages of Kafka's protocol at the beginning, each after its size, and what is left."""
    whole = []
    while len(held) >= 4 and len(held) >= (size := 4 + int.from_bytes(held[:4], "big")):
        whole.append(held[:size])
        held = held[size:]
    return whole, held
