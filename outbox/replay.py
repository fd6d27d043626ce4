"""Replay: have the relay publish again the keys that retained entries name, as they are now."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import orjson

from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.schema import quote

KEYS_AT_ONCE = 5_000
"""How many keys one request names."""


@dataclass(frozen=True, slots=True)
class Selected:
    """Which entries are meant: of a type, within all that is given. Ids and times belong to the range, both ends."""

    type: str
    keys: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None
    first_id: int | None = None
    last_id: int | None = None


@dataclass(frozen=True, slots=True)
class Retained:
    """What of it is retained: entries, and keys among them. `removed_id`: what pruning went past."""

    entries: int
    keys: int
    removed_id: int


_WHERE = """
    e.type = %(type)s
    AND (%(keys)s::text[] IS NULL OR e.key = ANY (%(keys)s::text[]))
    AND (%(since)s::timestamptz IS NULL OR e.created_at >= %(since)s::timestamptz)
    AND (%(until)s::timestamptz IS NULL OR e.created_at <= %(until)s::timestamptz)
    AND (%(first_id)s::bigint IS NULL OR e.id >= %(first_id)s::bigint)
    AND (%(last_id)s::bigint IS NULL OR e.id <= %(last_id)s::bigint)
    AND e.id > s.removed_id
"""


def count(connection: Connection, schema: str, selected: Selected) -> Retained:
    """Look, without asking for anything."""
    s = quote(schema)
    with connection.transaction():
        _may_take_long(connection)
        row = connection.execute(
            f"SELECT count(*), count(DISTINCT e.key), (SELECT removed_id FROM {s}.settings)"
            f" FROM {s}.entries e, {s}.settings s WHERE {_WHERE}".encode(),
            _arguments(selected),
        ).fetchone()
    return Retained(*(row or (0, 0, 0)))


def first_id(connection: Connection, schema: str, selected: Selected) -> int | None:
    """The least id that is meant; None: from the first that is retained."""
    if selected.since is None:
        return selected.first_id
    s = quote(schema)
    with connection.transaction():
        _may_take_long(connection)
        row = connection.execute(
            f"SELECT min(e.id) FROM {s}.entries e, {s}.settings s WHERE {_WHERE}".encode(), _arguments(selected)
        ).fetchone()
    # Nothing is: from behind the last.
    return row[0] if row and row[0] is not None else 2**62


def _may_take_long(connection: Connection) -> None:
    # It reads all that is retained: no index serves keys and times.
    connection.execute("SET LOCAL statement_timeout = 0")


@contextmanager
def keys(connection: Connection, schema: str, selected: Selected) -> Iterator[Iterator[tuple[str, int]]]:
    """Its keys, each with the greatest id of its chosen entries; in bounded memory, however many there are.

    They are laid down in a file before the first is given: who asks for something with each must not hold a snapshot
    meanwhile, nor read what the asking adds.
    """
    s = quote(schema)
    with tempfile.TemporaryFile() as file:
        with connection.transaction(), connection.cursor("replay") as cursor:
            _may_take_long(connection)
            # By id: the entries of the keys that one request names lie near each other.
            cursor.execute(
                f"SELECT e.key, max(e.id) FROM {s}.entries e, {s}.settings s WHERE {_WHERE}"
                " GROUP BY e.key ORDER BY max(e.id)".encode(),
                _arguments(selected),
            )
            for row in cursor:
                file.write(orjson.dumps(row) + b"\n")
        file.seek(0)
        yield (tuple(orjson.loads(line)) for line in file)


def requests(entity_type: EntityType, chosen: Iterator[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The arguments of the requests that replay these keys, in turn."""
    while some := list(islice(chosen, KEYS_AT_ONCE)):
        # The last retained entry, which a type without a source publishes, is not older than the chosen one.
        from_id = {} if entity_type.source is not None else {"from_id": min(number for _, number in some)}
        yield {"type": entity_type.name, "keys": [key for key, _ in some], **from_id}


def _arguments(selected: Selected) -> dict[str, object]:
    keys = None if selected.keys is None else list(selected.keys)
    return {
        "type": selected.type,
        "keys": keys,
        "since": selected.since,
        "until": selected.until,
        "first_id": selected.first_id,
        "last_id": selected.last_id,
    }
