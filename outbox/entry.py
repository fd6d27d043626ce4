"""An entry: one row of the outbox, as the relay reads it."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One row of the table `entries`.

    A named tuple, in the order of the columns of the query `entries`: psycopg makes one a row, and nothing is
    copied on the way to Kafka.

    `id` is the entry's id; `type` and `key` name the entity; `state` is the full current state, or None for a
    tombstone; `created_ms` are milliseconds since 1970, UTC; `content_type` None means JSON; `headers` are the
    entry's own as the text of a JSON object, or None.
    """

    id: int
    type: str
    key: str
    state: bytes | None
    created_ms: int
    content_type: str | None = None
    cause: str | None = None
    headers: str | None = None
