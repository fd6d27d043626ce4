"""The topic's side of a comparison: of each key the digests of its last record, in a file.

A process of its own can read a long topic, while this one reads the source: both are work for a processor.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection as Pipe
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import cast

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
# Below so many offsets a process costs more than it saves.
_WORTH = 50_000
_LOOK_SECONDS = 0.1


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
        fill(
            self._database,
            "INSERT INTO records (key, value, bytes, valued, look) VALUES (?, ?, ?, ?, ?)",
            (self._of_record(record, look) for record in records),
        )
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
        key = (record.key or b"").decode(errors="replace")
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


def fill(database: sqlite3.Connection, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
    """Write many rows, some at a time."""
    database.execute("BEGIN")
    taken = iter(rows)
    while some := list(islice(taken, ROWS_AT_ONCE)):
        database.executemany(statement, some)
    database.execute("COMMIT")


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


@contextmanager
def beside(
    path: Path, equality: Equality, reading: Reading, told: Callable[[int], None]
) -> Iterator[Callable[[], None]]:
    """Fill the side in `path` while the body runs, in another process where that is worth it.

    What is given waits until it is filled, and raises what went wrong with it; `told` is called meanwhile.
    """
    if reading.offsets < _WORTH or not _can_be_sent(equality):
        _fill(path, equality, reading, told)
        yield lambda: None
        return
    # Not forked: the clients of both servers have threads.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    read = cast("Synchronized[int]", context.Value("Q", 0))
    process = context.Process(target=_run, args=(path, equality, reading, read, theirs), daemon=True)
    process.start()
    theirs.close()

    def wait() -> None:
        while not ours.poll(_LOOK_SECONDS):
            told(read.value)
        try:
            failed = ours.recv()
        except EOFError:
            process.join()
            raise OutboxError(
                f"The process that read the topic {reading.topic} was ended ({process.exitcode}).",
                cure="See whether the machine had memory enough, and try again.",
            ) from None
        if failed is not None:
            raise failed

    try:
        yield wait
    finally:
        process.kill()
        process.join()
        ours.close()


def _can_be_sent(equality: Equality) -> bool:
    """Whether another process can be given it: a function of the service's that has no name cannot."""
    try:
        pickle.dumps(equality)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _fill(path: Path, equality: Equality, reading: Reading, told: Callable[[int], None]) -> None:
    with closing(TopicSide(path, equality)) as side:
        side.take(reading.records(told), 0)


def _run(path: Path, equality: Equality, reading: Reading, read: Synchronized[int], done: Pipe) -> None:
    """What the other process does; what it fails with is sent, and None when it is done."""
    # Ctrl-C is for the whole group of a terminal; who asked says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked_by = multiprocessing.parent_process()

    def told(number: int) -> None:
        read.value = number
        if asked_by is not None and not asked_by.is_alive():
            raise SystemExit(1)

    failed: Exception | None = None
    try:
        _fill(path, equality, reading, told)
    except Exception as error:  # noqa: BLE001  it is raised where it is waited for
        failed = error
    done.send(failed)
