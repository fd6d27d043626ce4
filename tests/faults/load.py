"""The owning service under load: several types, hot and cold keys, deletes, and every kind of transaction.

Writers go on whatever happens: a connection that breaks is made anew, a transaction that fails is forgotten.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import orjson
import psycopg

TYPES = {"hot": 3, "every": 12, "wide": 400}
"""The entity types, with how many entities of each there are: `every` has collapse off, a few of `hot` are changed all
the time."""

DOMAIN = """
CREATE TABLE thing (type text, key text, version bigint NOT NULL DEFAULT 0, alive boolean NOT NULL DEFAULT false,
                    changed_on integer NOT NULL DEFAULT 0, PRIMARY KEY (type, key));
CREATE TABLE ledger (id bigint PRIMARY KEY, type text NOT NULL, key text NOT NULL, version bigint,
                     xid xid8 NOT NULL DEFAULT pg_current_xact_id());
INSERT INTO thing (type, key) SELECT type, 'k' || n FROM (VALUES {rows}) t (type, keys), generate_series(1, keys) n
"""


ENTER = """
WITH entry AS (
    INSERT INTO outbox.entries (type, key, state) VALUES (%(type)s, %(key)s, %(state)s) RETURNING id
)
INSERT INTO ledger (id, type, key, version) SELECT id, %(type)s, %(key)s, %(version)s FROM entry RETURNING id
"""
"""An entry, and beside it what the judge believes: the ledger is the service's own, no pruning and no adoption changes
it. Its `version` is null for a tombstone."""


def make_domain(url: str) -> None:
    """The service's tables, without a single change."""
    rows = ", ".join(f"('{name}', {count})" for name, count in TYPES.items())
    with psycopg.connect(url) as connection:
        connection.execute(DOMAIN.format(rows=rows).encode())


@dataclass
class Load:
    """Concurrent writers, until `stop`. `url` may change while they run: new connections go there.

    `asynchronous`: the share of commits that do not wait for the disk. `aborts`: that of transactions that roll back.
    `pause`: the longest pause between two transactions, seconds. `written` counts the transactions that committed, as
    far as their writer knows; `failed` those that did not, each with a first word of why in `errors`. `slowest` is the
    longest that a single entry took to be inserted, seconds. `believed` are the ids of all entries whose commit was
    acknowledged: what a server forgets of them only this process knows.
    """

    url: Callable[[], str]
    writers: int = 4
    asynchronous: float = 0.0
    aborts: float = 0.15
    pause: float = 0.02
    timeline: int = 1
    written: int = 0
    failed: int = 0
    slowest: float = 0.0
    believed: set[int] = field(default_factory=set)
    errors: dict[str, int] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _held: bool = False
    _busy: int = 0
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        for number in range(self.writers):
            thread = threading.Thread(target=self._run, args=(number,), name=f"writer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End them after the transaction at hand."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a writer hangs"
        self._threads.clear()

    def wait_written(self, more: int, *, seconds: float = 60) -> None:
        """Wait until so many more transactions have committed."""
        target = self.written + more
        deadline = time.monotonic() + seconds
        while self.written < target:
            assert time.monotonic() < deadline, f"only {self.written} of {target} transactions; errors: {self.errors}"
            self._over.wait(0.01)

    def hold(self, *, seconds: float = 60) -> None:
        """Let no writer begin anything, and wait until none is in a transaction."""
        self._held = True
        deadline = time.monotonic() + seconds
        while self._busy:
            assert time.monotonic() < deadline, "a writer does not come to an end"
            self._over.wait(0.01)

    def release(self) -> None:
        """Let them go on."""
        self._held = False

    def _may_begin(self) -> bool:
        with self._lock:
            self._busy += not self._held
            return not self._held

    def _run(self, number: int) -> None:
        chance = random.Random(f"writer {number}")
        while not self._over.is_set():
            try:
                with psycopg.connect(self.url(), connect_timeout=5) as connection:
                    connection.execute("SET statement_timeout = '20s'")
                    connection.commit()
                    while not self._over.is_set():
                        if self._may_begin():
                            try:
                                self._transact(connection, chance)
                            finally:
                                with self._lock:
                                    self._busy -= 1
                        self._over.wait(chance.random() * self.pause)
            except psycopg.Error as error:
                with self._lock:
                    self.failed += 1
                    word = error.__class__.__name__
                    self.errors[word] = self.errors.get(word, 0) + 1
                self._over.wait(0.1)

    def _transact(self, connection: psycopg.Connection, chance: random.Random) -> None:
        if chance.random() < 0.3:
            connection.execute("SELECT pg_current_xact_id()")
        if chance.random() < self.asynchronous:
            connection.execute("SET LOCAL synchronous_commit = off")
        chosen = {
            (name, f"k{chance.randint(1, count)}")
            for name, count in TYPES.items()
            for _ in range(chance.randint(0, 3 if name == "wide" else 1))
        }
        written: set[int] = set()
        for name, key in sorted(chosen):
            if chance.random() < 0.1:
                connection.execute("SAVEPOINT here")
                self._change(connection, chance, name, key)
                connection.execute("ROLLBACK TO SAVEPOINT here")
            written.add(self._change(connection, chance, name, key))
        if chance.random() < self.aborts:
            connection.rollback()
            return
        connection.commit()
        with self._lock:
            self.written += 1
            self.believed |= written

    def _change(self, connection: psycopg.Connection, chance: random.Random, name: str, key: str) -> int:
        alive = chance.random() > 0.12
        row = connection.execute(
            "UPDATE thing SET version = version + 1, alive = %s, changed_on = %s WHERE type = %s AND key = %s"
            " RETURNING version",
            [alive, self.timeline, name, key],
        ).fetchone()
        assert row is not None
        state = orjson.dumps({"version": row[0], "on": self.timeline}) if alive else None
        began = time.monotonic()
        entry = connection.execute(
            ENTER, {"type": name, "key": key, "state": state, "version": row[0] if alive else None}
        ).fetchone()
        self.slowest = max(self.slowest, time.monotonic() - began)
        assert entry is not None
        return int(entry[0])
