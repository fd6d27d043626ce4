"""Writers that do everything a reader may stumble over, and the judge of what a reader made of it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import orjson
import psycopg


class Seen(NamedTuple):
    """One published state: the entry's id, its key, and the version that its state carries (None: a tombstone)."""

    id: int
    key: str
    version: int | None


DOMAIN = """
CREATE TABLE thing (key text PRIMARY KEY, version bigint NOT NULL DEFAULT 0, alive boolean NOT NULL DEFAULT true);
INSERT INTO outbox.entity_types (name, topic) VALUES ('thing', 'thing');
"""


def make_domain(url: str, keys: int, *, topic: str = "thing") -> None:
    """A table of things, all at version 0, whose states are published as `thing`."""
    with psycopg.connect(url) as connection:
        connection.execute(DOMAIN)
        connection.execute("UPDATE outbox.entity_types SET topic = %s", [topic])
        connection.execute("INSERT INTO thing (key) SELECT 'k' || n FROM generate_series(1, %s) n", [keys])


@dataclass
class Writers:
    """Concurrent writers: rollbacks, savepoints, pauses, transactions that get their xid early, several keys each.

    Each change counts the thing's version up in its row and writes the entry in the same transaction, after it.
    `stop()` ends them; an error in one is raised there.
    """

    url: str
    keys: int
    count: int = 12
    transactions: int | None = None
    deletes: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Self:
        for number in range(self.count):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether any of them still writes."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Wait until all have done their transactions."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a writer hangs"
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        """End them after the transaction at hand."""
        self._stop.set()
        self.join()

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        try:
            with psycopg.connect(self.url) as connection:
                done = 0
                while not self._stop.is_set() and (self.transactions is None or done < self.transactions):
                    self._transact(connection, chance)
                    done += 1
        except BaseException as error:
            self._errors.append(error)

    def _transact(self, connection: psycopg.Connection, chance: random.Random) -> None:
        if chance.random() < 0.4:
            connection.execute("SELECT pg_current_xact_id()")
            self._pause(connection, chance)
        for key in sorted(chance.sample(range(1, self.keys + 1), chance.randint(1, 3))):
            if chance.random() < 0.15:
                connection.execute("SAVEPOINT here")
                self._change(connection, chance, f"k{key}")
                connection.execute("ROLLBACK TO SAVEPOINT here")
            self._change(connection, chance, f"k{key}")
            if chance.random() < 0.3:
                self._pause(connection, chance)
        if chance.random() < 0.15:
            connection.rollback()
        else:
            connection.commit()

    def _change(self, connection: psycopg.Connection, chance: random.Random, key: str) -> None:
        alive = not (self.deletes and chance.random() < 0.2)
        row = connection.execute(
            "UPDATE thing SET version = version + 1, alive = %s WHERE key = %s RETURNING version", [alive, key]
        ).fetchone()
        assert row is not None
        state = orjson.dumps({"key": key, "version": row[0]}) if alive else None
        connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('thing', %s, %s)", [key, state])

    @staticmethod
    def _pause(connection: psycopg.Connection, chance: random.Random) -> None:
        # In the server: what matters is that the transaction stays open while others commit.
        connection.execute("SELECT pg_sleep(%s)", [chance.random() * 0.01])


class Judgement(NamedTuple):
    """What is wrong with what a reader saw: ids never seen, ids seen twice, states older than one seen before."""

    lost: set[int]
    doubled: set[int]
    stale: list[Seen]

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.stale)


def judge(committed: Iterable[int], seen: Sequence[Seen]) -> Judgement:
    """Compare what a reader saw, in its order, with the ids of all committed entries."""
    ids: set[int] = set()
    doubled: set[int] = set()
    newest: dict[str, int] = {}
    stale: list[Seen] = []
    for one in seen:
        (doubled if one.id in ids else ids).add(one.id)
        if one.version is not None:
            if one.version <= newest.get(one.key, 0):
                stale.append(one)
            newest[one.key] = max(one.version, newest.get(one.key, 0))
    return Judgement(set(committed) - ids, doubled, stale)


def committed_ids(url: str) -> list[int]:
    """The ids of all entries in the table."""
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM outbox.entries ORDER BY id")]
