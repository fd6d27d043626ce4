"""Pruning: empty the ring slots that are older than the retention, published by every shard, and no anchor's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime

import orjson
from psycopg import errors as pg
from psycopg import sql as psycopg_sql

from outbox import sql
from outbox.config import Config
from outbox.database import Connection, connect_as, place, translate, translated
from outbox.patience import Patience
from outbox.position import Position
from outbox.schema import quote


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of one slot: `entries` were removed, or `reason` says why not."""

    slot: int
    pruned: bool
    entries: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot of the ring: about how many entries it holds, and the age of its oldest and newest."""

    slot: int
    entries: int
    oldest: datetime | None
    newest: datetime | None
    current: bool


def prune_ring(
    config: Config,
    positions: Sequence[Position],
    *,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Pruned]:
    """Prune every slot that can be; one transaction each, so that no lock is held for long.

    `positions` must be committed ones, read before; a shard without one pins everything. The decision is made under
    the slot's lock, which is waited for no longer than `lock_timeout`. A slot is old when it is by the database's clock
    and by `now` (seconds since 1970, this machine's): one of them may have jumped. `stop` ends waiting for the server.
    """
    where = place(config.database_url)
    known = orjson.dumps([position.for_prune() for position in positions]).decode()
    schema = quote(config.schema)
    patience = Patience(config.statement_timeout + config.lock_timeout + 5, stop=stop)
    with closing(patience), connect_as(config, "outbox-prune", patience=patience) as connection:
        wait = psycopg_sql.SQL("SET LOCAL lock_timeout = {}").format(
            psycopg_sql.Literal(round(config.lock_timeout * 1000))
        )

        def prune(slot: int) -> Pruned:
            try:
                with patience.call(connection), connection.transaction(force_rollback=dry_run):
                    connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                    connection.execute(wait)
                    row = connection.execute(
                        f"SELECT {schema}.prune_slot(%s::smallint, %s::jsonb)".encode(), [slot, known]
                    ).fetchone()
            except pg.LockNotAvailable:
                return Pruned(slot, pruned=False, entries=0, reason="locked by an open transaction")
            except pg.Error as error:
                raise translate(error, where) from error
            said = row[0] if row else {}
            return Pruned(slot, bool(said["pruned"]), int(said["entries"]), said["reason"])

        with translated(where), patience.call(connection), connection.transaction():
            connection.execute(wait)
            slot_count, young = _young(connection, schema, now)
        found = {
            slot: Pruned(slot, pruned=False, entries=0, reason=young[slot]) if slot in young else prune(slot)
            for slot in range(slot_count)
        }
        # Most transactions that were open a moment ago have ended by now.
        found |= {slot: prune(slot) for slot, one in found.items() if (one.reason or "").startswith("sealed")}
    yield from found.values()


def _young(connection: Connection, schema: str, now: Callable[[], float]) -> tuple[int, dict[int, str]]:
    """How many slots there are; and why those stay that only seem old, since a clock jumped."""
    queries = {name: query.replace("{schema}", schema).encode() for name, query in sql.load("prune").items()}
    row = connection.execute(queries["ring"]).fetchone()
    if row is None:
        return 0, {}
    slot_count, shards, retention = row
    young: dict[int, str] = {}
    for slot, age, their_now in connection.execute(queries["newest"], {"slots": slot_count, "shards": shards}):
        ahead = their_now - now()
        if age < retention:
            young[slot] = "retained"
        elif age - ahead < retention:
            young[slot] = f"retained: old only by the database's clock, which is {ahead:.0f} s ahead of this machine's"
    return slot_count, young


def slots(connection: Connection, schema: str) -> list[Slot]:
    """The ring, slot by slot; costs a few probes a slot, however much is retained."""
    query = sql.load("prune")["slots"].replace("{schema}", quote(schema))
    return [Slot(*row) for row in connection.execute(query.encode(), {"schema": schema})]
