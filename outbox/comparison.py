"""A comparison: the two sides of a topic, as digests in a file, and which keys differ.

Memory does not grow with the keys: SQLite does the join.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from outbox.canonical import digest
from outbox.equality import Equality
from outbox.kafka.reader import Record
from outbox.message import CONTENT_TYPE_HEADER

KINDS = ("missing", "stale", "orphaned", "undecodable")
"""A key of the source without a live record; one whose record says something else; a live record without a row; a
record that cannot be read as what it says it is."""
_ROWS_AT_ONCE = 2_000
_KEYS_AT_ONCE = 1_000
_EXAMPLES = 20


@dataclass
class Report:
    """Counts of keys; `examples` are the first of each kind that differs, `moving` those that never held still."""

    equal: int = 0
    missing: int = 0
    stale: int = 0
    orphaned: int = 0
    undecodable: int = 0
    moving: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def different(self) -> int:
        """How many keys differ."""
        return self.missing + self.stale + self.orphaned + self.undecodable

    @property
    def keys(self) -> int:
        """How many were compared."""
        return self.equal + self.different + self.moving


class Comparison:
    """Two sides of a topic, as digests, in a file of its own.

    `topic` has of each key the last record: digests of its value and of its bytes (both null: a tombstone; where it has
    a value, that stands for both), whether it is compared by value (JSON, unless its type says otherwise), and in which
    look it came. `source` has of each key the digests of its state.
    """

    def __init__(self, directory: Path, equality: Equality) -> None:
        self._equality = equality
        # By content type: there are a few.
        self._valued: dict[bytes | None, bool] = {}
        self._database = sqlite3.connect(directory / "reconcile.sqlite", isolation_level=None)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
            CREATE TABLE records (place INTEGER PRIMARY KEY, key TEXT, value BLOB, bytes BLOB, valued INT, look INT);
            CREATE TABLE rows (key TEXT, value BLOB, bytes BLOB);
            CREATE TABLE topic (key TEXT PRIMARY KEY, value BLOB, bytes BLOB, valued INT, look INT) WITHOUT ROWID;
            CREATE TABLE source (key TEXT PRIMARY KEY, value BLOB, bytes BLOB) WITHOUT ROWID;
            CREATE TABLE again (key TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE found (key TEXT PRIMARY KEY, kind TEXT) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def empty(self) -> None:
        """Begin anew."""
        for table in ("records", "rows", "topic", "source", "again", "found"):
            self._database.execute(f"DELETE FROM {table}")

    def take_records(self, records: Iterable[Record], look: int) -> None:
        """Take in records of the topic, in order for each key."""
        self._fill("INSERT INTO records (key, value, bytes, valued, look) VALUES (?, ?, ?, ?, ?)",
                   (self._of_record(record, look) for record in records))  # fmt: skip
        # The greatest place is the last record; SQLite takes the other columns of that row. Sorted, so that a table of
        # millions is written from its beginning to its end.
        self._database.executescript(
            """
            INSERT OR REPLACE INTO topic SELECT key, value, bytes, valued, look FROM
                (SELECT key, value, bytes, valued, look, max(place) FROM records GROUP BY key ORDER BY key);
            DELETE FROM records;
            """
        )

    def take_rows(self, rows: Iterable[tuple[str, bytes | None]], *, of: Sequence[str] | None = None) -> None:
        """Take in rows of the source; `of`: they are all that there are of these keys."""
        if of is not None:
            self._fill("DELETE FROM source WHERE key = ?", ((key,) for key in of))
        value = self._equality.value
        made = ((key, None if state is None else value(state), digest(state or b"")) for key, state in rows)
        self._fill("INSERT INTO rows (key, value, bytes) VALUES (?, ?, ?)", made)
        self._database.executescript(
            "INSERT OR REPLACE INTO source SELECT key, value, bytes FROM rows ORDER BY key; DELETE FROM rows;"
        )

    def _fill(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._database.execute("BEGIN")
        taken = iter(rows)
        while some := list(islice(taken, _ROWS_AT_ONCE)):
            self._database.executemany(statement, some)
        self._database.execute("COMMIT")

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

    def compare(self, look: int, *, everything: bool) -> None:
        """Compare all keys, or those to be looked at again; which of them are to be looked at once more."""
        among = "" if everything else " AND key IN (SELECT key FROM again)"
        self._database.executescript(
            f"""
            DELETE FROM found WHERE 1{among};
            INSERT OR REPLACE INTO found
            SELECT key, CASE WHEN t.key IS NULL OR t.bytes IS NULL THEN 'missing'
                             WHEN t.valued AND t.value IS NULL THEN 'undecodable' ELSE 'stale' END
            FROM source s LEFT JOIN topic t USING (key)
            WHERE (t.bytes IS NULL OR CASE WHEN t.valued THEN t.value IS NOT s.value OR t.value IS NULL
                                           ELSE t.bytes IS NOT s.bytes END){among}
            UNION ALL
            SELECT key, CASE WHEN t.valued AND t.value IS NULL THEN 'undecodable' ELSE 'orphaned' END
            FROM topic t WHERE t.bytes IS NOT NULL AND NOT EXISTS (SELECT 1 FROM source s WHERE s.key = t.key){among};
            DELETE FROM again;
            INSERT INTO again SELECT f.key FROM found f JOIN topic t USING (key) WHERE t.look = {look:d};
            """
        )

    def again(self) -> Iterator[list[str]]:
        """The keys to be looked at again, some at a time."""
        last = ""
        while True:
            rows = self._database.execute(
                "SELECT key FROM again WHERE key > ? ORDER BY key LIMIT ?", [last, _KEYS_AT_ONCE]
            ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [row[0] for row in rows]

    def different(self) -> Iterator[list[str]]:
        """The keys that differ, some at a time; without those that could not be told."""
        cursor = self._database.execute("SELECT key FROM found WHERE key NOT IN (SELECT key FROM again) ORDER BY key")
        while rows := cursor.fetchmany(_KEYS_AT_ONCE):
            yield [row[0] for row in rows]

    def report(self) -> Report:
        """What was found."""
        report = Report()
        settled = "FROM found WHERE key NOT IN (SELECT key FROM again)"
        for kind, count in self._database.execute(f"SELECT kind, count(*) {settled} GROUP BY kind"):
            setattr(report, kind, count)
            rows = self._database.execute(f"SELECT key {settled} AND kind = ? ORDER BY key LIMIT ?", [kind, _EXAMPLES])
            report.examples[kind] = [row[0] for row in rows]
        (report.moving,) = self._database.execute("SELECT count(*) FROM again").fetchone()
        (there,) = self._database.execute(
            "SELECT (SELECT count(*) FROM source) + (SELECT count(*) FROM topic t WHERE t.bytes IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM source s WHERE s.key = t.key))"
        ).fetchone()
        report.equal = there - report.different - report.moving
        return report


@contextmanager
def comparison(equality: Equality | None = None) -> Iterator[Comparison]:
    """An empty comparison, in a directory that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="outbox-reconcile-") as directory,
        closing(Comparison(Path(directory), equality or Equality())) as made,
    ):
        yield made
