"""Backfill: have the relay publish what a type's source holds, and see how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from outbox import requests, source
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.errors import ConfigError
from outbox.position import Position
from outbox.requests import Asked
from outbox.schema import quote
from outbox.source import Source

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Checked:
    """What a source holds now: `rows`, and why its pages would be slow (None: they are not)."""

    rows: int
    slow: str | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is, over all shards. `error`: why one of them ended early."""

    rows: int
    refused: int
    error: str | None


def check(connection: Connection, entity_type: EntityType, *, where: str | None = None) -> Checked:
    """Read a type's source once, in its order: how many rows it has. Nothing is written.

    Raises `ConfigError` when it has no source, one that cannot be read, null keys or the same key twice: a page could
    end between those.
    """
    found = _look(connection, entity_type)
    with connection.transaction(force_rollback=True):
        _prepare(connection, entity_type)
        try:
            row = connection.execute(_survey(found, where).encode()).fetchone()
        except psycopg.Error as error:
            raise ConfigError(
                f'The source of "{entity_type.name}" cannot be read: {error.diag.message_primary or error}.',
                cure="Correct the source (outbox types change TYPE --source ...) or the condition (--where).",
            ) from error
    rows, nulls, others, twice, examples = row or (0, 0, 0, 0, None)
    if nulls or others or twice:
        shown = f": {', '.join(map(str, examples))}" if examples else ""
        columns = ", ".join(column.name for column in found.order)
        if nulls:
            what = f"{nulls} rows without a key, or with a null in what it is made of ({columns})"
        elif others:
            what = f"{others} rows whose key is not made of {columns}, as the texts of these joined with colons{shown}"
        else:
            what = f"{twice} rows with the key of another{shown}"
        raise ConfigError(
            f'The source of "{entity_type.name}" has {what}.',
            cure="Each entity has one row in it: correct the source, for instance by a condition or a GROUP BY.",
        )
    return Checked(rows, source.slow_pages(connection, found))


def _look(connection: Connection, entity_type: EntityType) -> Source:
    if entity_type.source is None:
        raise ConfigError(
            f'The entity type "{entity_type.name}" has no source: what there is to publish is not known.',
            cure=f"Name it: outbox types change {entity_type.name} --source '{source.EXAMPLE}'.",
        )
    return source.look(connection, entity_type.name, entity_type.source)


def _prepare(connection: Connection, entity_type: EntityType) -> None:
    connection.execute("SET TRANSACTION READ ONLY")
    connection.execute("SET LOCAL statement_timeout = 0")
    source.run_under(connection, derived=entity_type.derived)


def _survey(found: Source, where: str | None) -> str:
    order = ", ".join(f"s.{quote(column.name)}" for column in found.order)
    condition = f" WHERE ({where}\n)" if where is not None else ""
    # In the order of the index, so that equal keys stand beside each other and nothing is sorted.
    return (
        "SELECT count(*), count(*) FILTER (WHERE key IS NULL OR made IS NULL), count(*) FILTER (WHERE key <> made),"
        f" count(*) FILTER (WHERE again), (array_agg(key) FILTER (WHERE again OR key <> made))[1:{_EXAMPLES}] FROM ("
        f"SELECT s.key::text AS key, {found.key_made} AS made,"
        f" ROW({order}) = lag(ROW({order})) OVER (ORDER BY {order}) AS again"
        f" FROM (\n{found.query}\n) AS s{condition}) AS surveyed"
    )


def named(connection: Connection, entity_type: EntityType, keys: Sequence[str]) -> int:
    """How many of some keys the source has rows of."""
    found = _look(connection, entity_type)
    given = found.looked_up(keys)
    if given is None:
        return 0
    with connection.transaction(force_rollback=True):
        _prepare(connection, entity_type)
        try:
            return len(connection.execute(found.rows_of(bare=True).encode(), given).fetchall())
        except psycopg.DataError as error:
            raise ConfigError(
                f'A key cannot be one of "{entity_type.name}": {error.diag.message_primary or error}.',
                cure="Keys are written as the topic has them.",
            ) from error


def start(
    connection: Connection,
    schema: str,
    entity_type: EntityType,
    *,
    shards: int,
    where: str | None = None,
    rate: float | None = None,
    total: int | None = None,
) -> int:
    """Ask for a backfill; the request's id. `rate`: rows a second at the most. `total`: shown by whoever watches."""
    # Of which source it is tells whether it has filled a topic as that is now.
    of = source.digest(entity_type.source)
    arguments = {"type": entity_type.name, "where": where, "rate": rate, "total": total, "source": of}
    return requests.ask_backfill(connection, schema, arguments, shards=shards)


def progress(asked: Asked, positions: Sequence[Position | None]) -> Progress:
    """How far a request is, by what the positions say, or, of shards that are through with it, the control table."""
    if asked.progress is not None:
        return Progress(asked.progress["rows"], asked.progress["refused"], None)
    rows = refused = 0
    error: str | None = None
    for shard, position in enumerate(positions):
        said: Mapping[str, Any] = asked.outcomes.get(shard) or {}
        if not said and position is not None:
            said = position.requests.get(str(asked.id), {})
            said = said.get("done", said)
        rows += said.get("rows", 0)
        refused += said.get("refused", 0)
        error = error or said.get("error")
    return Progress(rows, refused, error)
