"""A table of the owner's that was there before: what a backfill publishes, and a snapshot copies."""

from __future__ import annotations

import psycopg

from bench.workload import Load, digits_sql

SOURCE = "SELECT id::text AS key, to_jsonb(t) AS state, id FROM thing t"
"""The query of all its keys and states, as an entity type has it."""
_TABLE = "CREATE TABLE thing (id bigint PRIMARY KEY, version bigint NOT NULL, description text NOT NULL)"
# With the other columns, and what JSON has around them, about 280 bytes.
_DESCRIPTION = 230


def rows(entries: int) -> Load:
    """The load of a table of so many rows: of row n the id, which is its key, is n, or 0 for the last one."""
    return Load(entries, entries, prefix="")


def make(url: str, load: Load) -> None:
    """Make the table with its rows, and have its statistics known."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_TABLE)
        load.fill(url, "thing", ("id", "version", "description"), (_id(load), f"{load.base} + n", _description()))
        connection.execute("VACUUM ANALYZE thing")


def state_sql(load: Load) -> str:
    """The state of row `n` as the source has it, a text."""
    return f"jsonb_build_object('id', {_id(load)}, 'version', {load.base} + n, 'description', {_description()})::text"


def _id(load: Load) -> str:
    return f"n % {load.keys}"


def _description() -> str:
    return f"left({digits_sql(_DESCRIPTION)}, {_DESCRIPTION})"
