"""Dead letters: ask the relay to publish them again or to forget them.

The command line never produces: it would fence the relay, or race it. It writes a request into the control table, and
the relay reads the last retained entry of each key in the snapshot of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from psycopg.types.json import Jsonb

from outbox.database import Connection
from outbox.errors import RelayError
from outbox.schema import quote


def request(
    connection: Connection, schema: str, kind: Literal["retry", "drop"], *, type_name: str | None, keys: Sequence[str]
) -> int:
    """Ask the relay to retry or drop dead letters: of a type (None: all), some keys or (empty) all; its id."""
    row = connection.execute(
        f"INSERT INTO {quote(schema)}.requests (kind, arguments) VALUES (%s, %s) RETURNING id".encode(),
        [kind, Jsonb({"type": type_name, "keys": list(keys) or None})],
    ).fetchone()
    if row is None:
        raise RelayError("The request was not written.")
    return int(row[0])


def wait_for(
    connection: Connection, schema: str, request_id: int, shards: int, *, seconds: float, on_wait: Callable[[], None]
) -> dict[int, Any] | None:
    """Wait until every shard has said what became of a request; by shard, or None when the time is over.

    `on_wait` is called once, if it takes longer than a moment.
    """
    deadline = time.monotonic() + seconds
    moment: float | None = time.monotonic() + 1
    while True:
        rows = connection.execute(
            f"SELECT shard, outcome FROM {quote(schema)}.request_outcomes WHERE request = %s".encode(), [request_id]
        ).fetchall()
        if len(rows) >= shards:
            return {row[0]: row[1] for row in rows}
        if time.monotonic() > deadline:
            return None
        if moment is not None and time.monotonic() > moment:
            on_wait()
            moment = None
        time.sleep(0.1)
