"""The topic's side of a comparison: of each key the digests of its last record, in a file.

A process of its own can read a long topic, while this one reads the source: both are work for a processor.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from outbox.canonical import digest
from outbox.equality import Equality
from outbox.errors import OutboxError
from outbox.kafka import reader
from outbox.kafka.reader import Record
from outbox.message import CONTENT_TYPE_HEADER
from outbox.sample import Sample

ROWS_AT_ONCE = 2_000
SETTINGS = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;"
"""Of a file that nobody needs after a crash."""
NO_TEXT = "\0"
"""What the name of a key begins with that is no text: its bytes follow, as hex. No key of a row has it."""
# Below so many offsets a process costs more than it saves.
_WORTH = 50_000
_LOOK_SECONDS = 0.1
# So many records at least are sorted at once.
_FOLDED = 1_000_000


class TopicSide:
    """Of each key the last record.

    Digests of its value and of its bytes (both null: a tombstone; where it has a value, that stands for both), whether
    it is compared by value (JSON, unless its type says otherwise), and in which look it came.
    """

    def __init__(self, path: Path, equality: Equality) -> None:
        self._equality = equality
        # By content type: there are a few.
        self._valued: dict[bytes | None, bool] = {}
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            f"""
            {SETTINGS}
            CREATE TABLE IF NOT EXISTS records
                (place INTEGER PRIMARY KEY, key TEXT, value BLOB, bytes BLOB, valued INT, look INT);
            CREATE TABLE IF NOT EXISTS topic
                (key TEXT PRIMARY KEY, value BLOB, bytes BLOB, valued INT, look INT) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def empty(self) -> None:
        """Begin anew."""
        self._database.executescript("DELETE FROM records; DELETE FROM topic;")

    def take(self, records: Iterable[Record], look: int) -> None:
        """Take in records of the topic, in order for each key."""
        made = (self._of_record(record, look) for record in records)
        # What has come is brought together with what is there as soon as it is as much: however often keys were
        # written, the file grows with the keys.
        while self._fill(islice(made, max(_FOLDED, self._keys()))):
            self._fold()

    def _fill(self, rows: Iterable[tuple[object, ...]]) -> int:
        statement = "INSERT INTO records (key, value, bytes, valued, look) VALUES (?, ?, ?, ?, ?)"
        return fill(self._database, statement, rows)

    def _keys(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM topic").fetchone()[0])

    def _fold(self) -> None:
        # The greatest place is the last record; SQLite takes the other columns of that row. Sorted, so that a table of
        # millions is written from its beginning to its end.
        self._database.executescript(
            """
            INSERT OR REPLACE INTO topic SELECT key, value, bytes, valued, look FROM
                (SELECT key, value, bytes, valued, look, max(place) FROM records GROUP BY key ORDER BY key);
            DELETE FROM records;
            """
        )

    def _of_record(self, record: Record, look: int) -> tuple[object, ...]:
        try:
            key = (record.key or b"").decode()
        except UnicodeDecodeError:
            # No row has it; a tombstone of it would have to be written by hand.
            key = f"{NO_TEXT}{(record.key or b'').hex()}"
            return key, None, None if record.value is None else digest(record.value), 1, look
        if record.value is None:
            return key, None, None, 1, look
        said = next((value for name, value in record.headers if name == CONTENT_TYPE_HEADER), None)
        valued = self._valued.get(said)
        if valued is None:
            valued = self._equality.by_value(None if said is None else said.decode(errors="replace"))
            self._valued[said] = valued
        value = self._equality.value(record.value) if valued else None
        # Of the bytes only that there are some counts where there is a value.
        return key, value, digest(record.value) if value is None else value, int(valued), look


def fill(database: sqlite3.Connection, statement: str, rows: Iterable[tuple[object, ...]]) -> int:
    """Write many rows, some at a time; how many."""
    written = 0
    database.execute("BEGIN")
    taken = iter(rows)
    while some := list(islice(taken, ROWS_AT_ONCE)):
        database.executemany(statement, some)
        written += len(some)
    database.execute("COMMIT")
    return written


# -- reading it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What is read of a topic: from offsets up to offsets, all keys or a sample of them."""

    bootstrap: str
    passthrough: Mapping[str, str]
    topic: str
    starts: Mapping[int, int]
    ends: Mapping[int, int]
    sample: Sample | None = None

    @property
    def offsets(self) -> int:
        """How many there are."""
        return sum(self.ends[partition] - start for partition, start in self.starts.items())

    def records(self, told: Callable[[int], None]) -> Iterator[Record]:
        """Them; `told` how many were read, now and then."""
        read = reader.read_between(self.bootstrap, self.passthrough, self.topic, self.starts, self.ends)
        for number, record in enumerate(read):
            if number % ROWS_AT_ONCE == 0:
                told(number)
            if self.sample is None or self.sample.takes(record.key or b""):
                yield record


class Beside:
    """A side that is being filled in another process; or one that is filled, where `process` is None."""

    def __init__(self, reading: Reading, told: Callable[[int], None]) -> None:
        self._reading = reading
        self._told = told
        self._process: BaseProcess | None = None

    def start(self, path: Path, equality: bytes) -> None:
        """Begin; raises `OSError` when there can be no other process."""
        # Not forked: the clients of both servers have threads.
        context = multiprocessing.get_context("spawn")
        self._done, theirs = context.Pipe(duplex=False)
        # Without a lock, which a process that is killed might hold.
        self._read = context.RawValue("Q", 0)
        process = context.Process(target=_run, args=(path, equality, self._reading, self._read, theirs), daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def look(self, seconds: float = 0.0) -> bool:
        """Whether it is filled, waiting at most so long; raises what went wrong with it."""
        if self._process is None:
            return True
        if not self._done.poll(seconds):
            return False
        process = self._process
        try:
            failed, where = self._done.recv()
        except EOFError:
            process.join()
            raise _ended(self._reading.topic, process.exitcode) from None
        finally:
            self.end()
        if failed is not None:
            raise failed from _ElsewhereError(where)
        return True

    def wait(self) -> None:
        """Wait until it is filled, telling how far it is."""
        while not self.look(_LOOK_SECONDS):
            self._told(self._read.value)

    def end(self) -> None:
        """Stop it, if it still goes on."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()
            self._done.close()


class _ElsewhereError(Exception):
    """Where in the other process it was raised: a cause that reads like a traceback."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _ended(topic: str, code: int | None) -> OutboxError:
    what = f"The process that read the topic {topic} ended"
    if code is not None and code < 0:
        return OutboxError(
            f"{what} by signal {-code}.", cure="See whether the machine had memory enough, and try again."
        )
    return OutboxError(f"{what} with code {code}.", cure="What it wrote to standard error says why.")


@contextmanager
def beside(path: Path, equality: Equality, reading: Reading, told: Callable[[int], None]) -> Iterator[Beside]:
    """Fill the side in `path` while the body runs, in another process where that is worth it and can be.

    `told` is called with how many offsets are read.
    """
    made = Beside(reading, told)
    sent = _sent(equality) if reading.offsets >= _WORTH else None
    try:
        if sent is None:
            raise OSError("not worth it")
        made.start(path, sent)
    except OSError:
        with closing(TopicSide(path, equality)) as side:
            side.take(reading.records(told), 0)
    try:
        yield made
    finally:
        made.end()


def _sent(equality: Equality) -> bytes | None:
    """It for another process; None for one with a function of the service's that has no name there."""
    try:
        return pickle.dumps(equality)
    except Exception:  # noqa: BLE001  the function may be any object, and it is asked here then
        return None


def _run(path: Path, equality: bytes, reading: Reading, read: Any, done: Pipe) -> None:
    """What the other process does; what it fails with is sent, and where, and None when it is done."""
    # Ctrl-C is for the whole group of a terminal; who asked says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()

    def told(number: int) -> None:
        read.value = number

    failed: Exception | None = None
    where = ""
    try:
        with closing(TopicSide(path, pickle.loads(equality))) as side:  # noqa: S301  its own process made it
            side.take(reading.records(told), 0)
    except Exception as error:  # noqa: BLE001  it is raised where it is waited for
        failed, where = error, traceback.format_exc()
    try:
        done.send((failed, where))
    except Exception as error:  # noqa: BLE001  an error that cannot be sent: what it says can
        done.send((OutboxError(f"The topic cannot be read: {failed!r} ({error})."), where))


def _end_with(asked_by: BaseProcess | None) -> None:
    """End when the process does that asked: killed, it ends nobody."""
    if asked_by is not None:
        asked_by.join()
        os._exit(1)
