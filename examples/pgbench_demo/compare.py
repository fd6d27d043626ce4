"""The proof: what a new consumer gets from the topics is what the tables hold, key by key and column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from outbox.kafka.reader import read_topic
from pgbench_demo.service import Published

MOST_LISTED = 10
"""How many differences of one topic are listed; all are counted."""


@dataclass
class Comparison:
    """One topic against its table.

    - `rows`: in the table; `live_keys`: in the topic, tombstones left out;
    - `records`: that a `read_committed` consumer gets from the start, `entries`: in the outbox for this type;
    - `differences`: how many keys (or records out of order) differ; `listed`: the first of them, in words.
    """

    type: str
    topic: str
    table: str
    rows: int = 0
    live_keys: int = 0
    records: int = 0
    entries: int = 0
    differences: int = 0
    listed: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether the topic says what the table says."""
        return self.differences == 0

    @property
    def collapse(self) -> float:
        """How many entries there were for each record; 1 when none was collapsed."""
        return self.entries / self.records if self.records else 1.0

    def differs(self, what: str) -> None:
        """Count a difference."""
        self.differences += 1
        if self.differences <= MOST_LISTED:
            self.listed.append(what)


def compare(url: str, bootstrap: str, published: Published, *, schema: str = "outbox") -> Comparison:
    """Read a topic from the start, `read_committed`, and compare it with its table as it is now.

    Nothing may write to the table meanwhile. The table's values come from the driver, not from the expression that
    made the states, so that a wrong expression is seen too.
    """
    result = Comparison(published.type, published.topic, published.table)
    live = _read_live(bootstrap, published.topic, result)
    result.live_keys = len(live)
    with psycopg.connect(url) as connection:
        found = connection.execute(
            sql.SQL("SELECT count(*) FROM {}.entries WHERE type = %s").format(sql.Identifier(schema)), [published.type]
        ).fetchone()
        result.entries = found[0] if found else 0
        for row in _rows(connection, published.table):
            result.rows += 1
            key = str(row[published.key])
            value = live.pop(key, None)
            if value is None:
                result.differs(f"{published.table} {key} is not in the topic")
            elif (difference := _difference(row, value)) is not None:
                result.differs(f"{published.table} {key}: {difference}")
    for key in live:
        result.differs(f"{published.topic} has the key {key}, {published.table} has not")
    return result


def _read_live(bootstrap: str, topic: str, result: Comparison) -> dict[str, bytes]:
    """The last value of each live key; says which record is not newer than the one before it of its key."""
    live: dict[str, bytes] = {}
    newest: dict[str, int] = {}
    for record in read_topic(bootstrap, {}, topic):
        result.records += 1
        key = (record.key or b"").decode()
        entry = int(dict(record.headers).get("outbox-id", b"0"))
        # What comes from no entry (a backfill, a repair) is as new as the log says.
        if entry and entry <= newest.get(key, 0):
            result.differs(f"{topic} {key}: a record of entry {entry} follows one of entry {newest[key]}")
        newest[key] = max(entry, newest.get(key, 0))
        if record.value is None:
            live.pop(key, None)
        else:
            live[key] = record.value
    return live


def _rows(connection: psycopg.Connection[Any], table: str) -> Iterator[dict[str, Any]]:
    # A cursor of the server: the table is read in pieces.
    with connection.cursor("demo_compare", row_factory=dict_row) as cursor:
        cursor.itersize = 10_000
        cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))
        yield from cursor


def _difference(row: Mapping[str, Any], value: bytes) -> str | None:
    """What the state says otherwise than the row, or None."""
    try:
        state = orjson.loads(value)
    except orjson.JSONDecodeError:
        return f"the topic has no JSON: {value[:40]!r}"
    if state == row:
        return None
    if not isinstance(state, dict):
        return f"the topic has {state!r}"
    for column in {**row, **state}:
        if column not in state:
            return f"the topic has no {column}"
        if column not in row:
            return f"the topic has a {column}, the table has none"
        if state[column] != row[column]:
            return f"{column} is {row[column]!r} in the table, {state[column]!r} in the topic"
    return None
