"""The control table: what the command line asks of the relay, and what became of it.

The command line never produces: it would fence the relay, or race it. It writes a request, which the relay does in a
batch of its own, in that batch's snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from psycopg.types.json import Jsonb

from outbox.database import Connection
from outbox.errors import ConfigError, NoRelayError, RelayError
from outbox.schema import quote


@dataclass(frozen=True, slots=True)
class Asked:
    """A row of the control table.

    `outcomes`: by shard, what the relay said became of it; `progress`: how far an application's own backfill is.

    `state` of a request of so many shards: `running`, `paused`, `cancelled`, or `done` once all have said so.
    """

    id: int
    kind: str
    arguments: Mapping[str, Any]
    requested_at: datetime
    paused: bool
    cancelled: bool
    outcomes: Mapping[int, Mapping[str, Any]]
    progress: Mapping[str, Any] | None = None

    def state(self, shards: int) -> str:
        """In a word."""
        if self.cancelled:
            return "cancelled"
        if len(self.outcomes) >= shards:
            return "done"
        return "paused" if self.paused else "running"


def ask(connection: Connection, schema: str, kind: str, arguments: Mapping[str, Any]) -> int:
    """Write a request and wake the relay; its id."""
    row = connection.execute(
        f"INSERT INTO {quote(schema)}.requests (kind, arguments) VALUES (%s, %s) RETURNING id".encode(),
        [kind, Jsonb(dict(arguments))],
    ).fetchone()
    if row is None:
        raise RelayError("The request was not written.")
    wake(connection, schema)
    return int(row[0])


def ask_backfill(
    connection: Connection, schema: str, arguments: Mapping[str, Any], *, shards: int, kind: str = "backfill"
) -> int:
    """Ask for a backfill; `ConfigError` with the other's id while one of the same type goes on."""
    s = quote(schema)
    with connection.transaction():
        # Two that are asked for at once: the second sees the first.
        connection.execute(f"LOCK TABLE {s}.requests IN SHARE ROW EXCLUSIVE MODE".encode())
        for other in find(connection, schema, kinds=("backfill", "app", "history")):
            if other.arguments.get("type") == arguments["type"] and other.state(shards) in {"running", "paused"}:
                what = "replay" if other.kind == "history" else "backfill"
                raise ConfigError(
                    f'A {what} of "{arguments["type"]}" goes on already: request {other.id} ({other.state(shards)}).',
                    cure=f"Watch it: outbox backfill watch {other.id}; or end it: outbox backfill cancel {other.id}.",
                )
        return ask(connection, schema, kind, arguments)


def wake(connection: Connection, schema: str) -> None:
    """Wake a sleeping relay, as a writer does."""
    connection.execute("SELECT pg_notify(%s, '')", [schema])


def find(
    connection: Connection, schema: str, *, kinds: Sequence[str] | None = None, number: int | None = None
) -> list[Asked]:
    """Requests, of some kinds (None: all) or of one number, the oldest first."""
    s = quote(schema)
    rows = connection.execute(
        f"""SELECT r.id, r.kind, r.arguments, date_part('epoch', r.requested_at), r.paused_at IS NOT NULL,
                   r.cancelled_at IS NOT NULL,
                   coalesce((SELECT jsonb_object_agg(o.shard, o.outcome) FROM {s}.request_outcomes o
                             WHERE o.request = r.id), '{{}}'),
                   r.progress
            FROM {s}.requests r
            WHERE (%(kinds)s::text[] IS NULL OR r.kind = ANY (%(kinds)s::text[]))
              AND (%(number)s::bigint IS NULL OR r.id = %(number)s::bigint)
            ORDER BY r.id""".encode(),
        {"kinds": list(kinds) if kinds is not None else None, "number": number},
    ).fetchall()
    return [
        # As a number: psycopg reads a time in the ISO style alone, and a session may have another.
        Asked(
            one,
            kind,
            arguments,
            datetime.fromtimestamp(at, UTC),
            paused,
            cancelled,
            {int(shard): said for shard, said in outcomes.items()},
            progress,
        )
        for one, kind, arguments, at, paused, cancelled, outcomes, progress in rows
    ]


def backfills(connection: Connection, schema: str, *, number: int | None = None) -> list[Asked]:
    """The backfills among the requests: by the relay, by named keys, by the service's own code, or of the log."""
    found = find(connection, schema, kinds=("backfill", "publish", "app", "history"), number=number)
    # What replay and reconcile hand over names keys as well, and no total.
    return [one for one in found if one.kind != "publish" or "total" in one.arguments]


def set_state(connection: Connection, schema: str, number: int, *, paused: bool | None = None) -> None:
    """Pause or resume a request, or cancel it (None)."""
    if paused is None:
        what = "cancelled_at = coalesce(cancelled_at, clock_timestamp())"
    else:
        what = "paused_at = coalesce(paused_at, clock_timestamp())" if paused else "paused_at = NULL"
    connection.execute(f"UPDATE {quote(schema)}.requests SET {what} WHERE id = %s".encode(), [number])
    wake(connection, schema)


def wait_for(
    connection: Connection,
    schema: str,
    request_id: int,
    shards: int,
    *,
    seconds: float,
    on_wait: Callable[[], None] = lambda: None,
) -> dict[int, Any]:
    """Wait until every shard has said what became of a request; by shard. `NoRelayError` when that takes too long.

    `on_wait` is called once, if it takes longer than a moment.
    """
    deadline = time.monotonic() + seconds
    moment: float | None = time.monotonic() + 1
    query = f"SELECT shard, outcome FROM {quote(schema)}.request_outcomes WHERE request = %s".encode()
    while True:
        outcomes: dict[int, Any] = dict(connection.execute(query, [request_id]).fetchall())
        if len(outcomes) >= shards:
            return outcomes
        if time.monotonic() > deadline:
            raise NoRelayError(
                f"Request {request_id} is written, but no relay has done it in {seconds:g} s.",
                cure="It will be done when a relay runs: outbox relay. See outbox status.",
            )
        if moment is not None and time.monotonic() > moment:
            on_wait()
            moment = None
        time.sleep(0.1)


def publish(
    connection: Connection, schema: str, arguments: Mapping[str, Any], shards: int, *, seconds: float
) -> list[Mapping[str, Any]]:
    """Have named keys published as they are now, and wait for it: what each shard made of it.

    Raises `NoRelayError` when no relay does it in time, `ConfigError` when the source cannot be read.
    """
    number = ask(connection, schema, "publish", arguments)
    outcomes = list(wait_for(connection, schema, number, shards, seconds=seconds).values())
    for outcome in outcomes:
        if "error" in outcome:
            raise ConfigError(
                f"Request {number} could not be done: {outcome['error']}.",
                cure="Mend the source: outbox types change TYPE --source ...",
            )
    return outcomes
