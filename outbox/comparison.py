"""A comparison: the two sides of a topic, as digests in a file, and which keys differ.

Memory does not grow with the keys: SQLite does the join.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from outbox.canonical import digest
from outbox.equality import Equality
from outbox.errors import ConfigError
from outbox.kafka.reader import Record
from outbox.topic_side import NO_TEXT, SETTINGS, TopicSide, fill

KINDS = ("missing", "stale", "orphaned", "undecodable")
"""A key of the source without a live record; one whose record says something else; a live record without a row; a
record that cannot be read as what it says it is."""
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
    """Two sides of a topic, as digests, in files of its own; see `TopicSide`.

    `source` has of each key the digests of its state.
    """

    def __init__(self, directory: Path, equality: Equality) -> None:
        self.equality = equality
        self.topic_path = directory / "topic.sqlite"
        self._topic = TopicSide(self.topic_path, equality)
        self._database = sqlite3.connect(directory / "reconcile.sqlite", isolation_level=None)
        self._database.execute("ATTACH ? AS topics", [str(self.topic_path)])
        self._database.executescript(
            f"""
            {SETTINGS}
            CREATE TABLE rows (key TEXT, value BLOB, bytes BLOB);
            CREATE TABLE source (key TEXT PRIMARY KEY, value BLOB, bytes BLOB) WITHOUT ROWID;
            CREATE TABLE again (key TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE found (key TEXT PRIMARY KEY, kind TEXT) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Give the files back."""
        self._database.close()
        self._topic.close()

    def empty(self) -> None:
        """Begin anew."""
        self._topic.empty()
        for table in ("rows", "source", "again", "found"):
            self._database.execute(f"DELETE FROM {table}")

    def take_records(self, records: Iterable[Record], look: int) -> None:
        """Take in records of the topic, in order for each key."""
        self._topic.take(records, look)

    def take_rows(self, rows: Iterable[tuple[str, bytes | None]], *, of: Sequence[str] | None = None) -> None:
        """Take in rows of the source; `of`: they are all that there are of these keys."""
        if of is not None:
            fill(self._database, "DELETE FROM source WHERE key = ?", ((key,) for key in of))
        value = self.equality.value
        made = ((key, None if state is None else value(state), digest(state or b"")) for key, state in rows)
        fill(self._database, "INSERT INTO rows (key, value, bytes) VALUES (?, ?, ?)", made)
        try:
            self._database.execute("INSERT INTO source SELECT key, value, bytes FROM rows ORDER BY key")
        except sqlite3.IntegrityError as error:
            several = self._database.execute(
                "SELECT key FROM rows GROUP BY key HAVING count(*) > 1 ORDER BY key LIMIT 3"
            ).fetchall()
            raise ConfigError(
                f"The source has rows of one key: {', '.join(repr(key) for (key,) in several)}. Which of them is meant "
                "nobody knows.",
                cure="Let it have one row for each key; outbox backfill start --dry-run counts the others.",
            ) from error
        self._database.execute("DELETE FROM rows")

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
        """The keys that differ, some at a time; without those that could not be told, and what is no key's text."""
        cursor = self._database.execute(
            "SELECT key FROM found WHERE key NOT IN (SELECT key FROM again) AND key NOT LIKE ? ORDER BY key",
            [f"{NO_TEXT}%"],
        )
        while rows := cursor.fetchmany(_KEYS_AT_ONCE):
            yield [row[0] for row in rows]

    def report(self) -> Report:
        """What was found."""
        report = Report()
        settled = "FROM found WHERE key NOT IN (SELECT key FROM again)"
        for kind, count in self._database.execute(f"SELECT kind, count(*) {settled} GROUP BY kind"):
            setattr(report, kind, count)
            rows = self._database.execute(f"SELECT key {settled} AND kind = ? ORDER BY key LIMIT ?", [kind, _EXAMPLES])
            report.examples[kind] = [row[0].replace(NO_TEXT, "bytes ") for row in rows]
        (report.moving,) = self._database.execute("SELECT count(*) FROM again").fetchone()
        # A key that the topic got after the snapshot was compared with nothing: it is no equal one.
        (report.equal,) = self._database.execute(
            "SELECT (SELECT count(*) FROM source) - (SELECT count(*) FROM found JOIN source USING (key))"
        ).fetchone()
        return report


@contextmanager
def comparison(equality: Equality | None = None) -> Iterator[Comparison]:
    """An empty comparison, in a directory that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="outbox-reconcile-") as directory,
        closing(Comparison(Path(directory), equality or Equality())) as made,
    ):
        yield made
