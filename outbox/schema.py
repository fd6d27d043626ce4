"""The outbox's schema: its versions, as statements; what a database holds of it; who may do what."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg import sql

from outbox.errors import ConfigError, SchemaError

NEWEST = 1

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
_RETENTION = re.compile(r"(\d+)\s+(second|minute|hour|day|week)s?")
NAME = re.compile(r"[a-zA-Z0-9._-]{1,100}")


def quote(identifier: str) -> str:
    """An identifier as SQL needs it."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL literal, whatever `standard_conforming_strings` says."""
    escaped = text.replace("'", "''")
    return f"E'{escaped.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{escaped}'"


MOST_SHARDS = 1024


def bell_key(schema: str, shard: int = 0) -> int:
    """The advisory lock key of a shard's doorbell (bigint): from the schema's name, so that it needs no row."""
    of_schema = int.from_bytes(
        hashlib.blake2b(b"outbox " + schema.encode(), digest_size=8).digest(), "big", signed=True
    )
    return of_schema // MOST_SHARDS * MOST_SHARDS + shard


@dataclass(frozen=True, slots=True)
class Settings:
    """What is fixed when an outbox is made.

    `name` prefixes its transactional ids and its own topics (None: the database's name). `schema` holds its tables.
    `shards` is the number of shares of the keys. `retention` (a number and a unit, `7 days`) is how long published
    entries are kept, in a ring of `slots` slots. `doorbell` is off for an outbox whose writers use two-phase commit.
    `ConfigError` for values that cannot be used.
    """

    name: str | None
    schema: str = "outbox"
    shards: int = 1
    retention: str = "7 days"
    slots: int = 12
    doorbell: bool = True

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ConfigError(
                f'"{self.name}" cannot be the name of an outbox: it is part of topics\' names.',
                cure="Use letters, digits, dot, underscore and hyphen, at most 100.",
            )
        if (
            not 1 <= len(self.schema.encode()) <= 63
            or any(c in self.schema for c in "\0%")
            or self.schema.startswith("pg_")
        ):
            # Drivers take a % for a parameter.
            raise ConfigError(
                f'"{self.schema}" cannot be the name of a schema.',
                cure="Use 1 to 63 bytes, without %, not beginning with pg_.",
            )
        if not 1 <= self.shards <= MOST_SHARDS:
            raise ConfigError(f"An outbox cannot have {self.shards} shards.", cure="Use 1 to 1024.")
        if not 3 <= self.slots <= 1000:
            raise ConfigError(f"A ring cannot have {self.slots} slots.", cure="Use 3 to 1000; the default is 12.")
        if self.retention_seconds < 1:
            raise ConfigError("The retention is zero.", cure="Use for example '7 days'.")

    @property
    def retention_seconds(self) -> int:
        """How long published entries are kept, seconds."""
        found = _RETENTION.fullmatch(self.retention.strip().lower())
        if not found:
            raise ConfigError(
                f'"{self.retention}" is no retention.',
                cure="Use a number and a unit, for example '7 days', '36 hours'.",
            )
        return int(found[1]) * _UNITS[found[2]]

    @property
    def slot_seconds(self) -> int:
        """How long the clock points at one slot: one slot is being filled, one may wait for pruning."""
        return math.ceil(self.retention_seconds / (self.slots - 2))

    def placeholders(self) -> dict[str, str]:
        """What stands for the names in braces in the SQL files."""
        ring = f"{quote(self.schema)}.ring()"
        n = self.shards
        shard = f"(((hashtextextended(key, hashtextextended(type, 0)) % {n}) + {n}) % {n})::smallint" if n > 1 else "0"
        return {
            "schema": quote(self.schema),
            "schema_literal": literal(quote(self.schema)),
            "name": "current_database()" if self.name is None else literal(self.name),
            "channel": literal(self.schema),
            "bell": str(bell_key(self.schema)),
            "bells_granted": " AND ".join(
                f"pg_try_advisory_xact_lock_shared({bell_key(self.schema, shard)})" for shard in range(self.shards)
            ),
            "bell_default": ring if self.doorbell else "NULL",
            "shards": str(self.shards),
            "shard": shard,
            "shard_source": f"GENERATED ALWAYS AS ({shard}) STORED" if n > 1 else "DEFAULT 0",
            "slots": str(self.slots),
            "slot_seconds": str(self.slot_seconds),
            "retention": f"make_interval(secs => {self.retention_seconds})",
            "doorbell": "true" if self.doorbell else "false",
        }


def statements_up(version: int, settings: Settings) -> list[str]:
    """The statements that make a version out of the one before it (version 1: out of nothing)."""
    return [s.format_map(settings.placeholders()) for s in _file(version, "up")]


def statements_down(version: int, settings: Settings) -> list[str]:
    """The statements that undo a version; version 1's delete every entry and entity type."""
    return [s.format_map(settings.placeholders()) for s in _file(version, "down")]


def do(body: str) -> str:
    """A statement that runs a PL/pgSQL block."""
    return f"DO {dollars(body)}"


def dollars(body: str) -> str:
    """A text between dollars, with a word between them that the text does not hold."""
    word = "outbox"
    while f"${word}$" in body:
        word += "_"
    return f"${word}${body}${word}$"


def create_schema(schema: str) -> str:
    """The statement that makes the schema, if it is not there."""
    # Looked for first: IF NOT EXISTS is denied to a role that may not create schemas, though it owns this one.
    return do(f"""
BEGIN
    IF to_regnamespace({literal(quote(schema))}) IS NULL THEN
        CREATE SCHEMA {quote(schema)};
    END IF;
END
""")


def drop_schema(schema: str) -> str:
    """The statement that removes the schema, if nothing of others is in it."""
    return do(f"""
BEGIN
    DROP SCHEMA {quote(schema)};
EXCEPTION WHEN dependent_objects_still_exist THEN
    RAISE NOTICE 'outbox: the schema holds other things and stays';
END
""")


def grants(schema: str, *, writers: Sequence[str] = (), relay: str | None = None) -> Iterator[str]:
    """The statements that let roles write entries, and one role publish them."""
    s = quote(schema)
    for role in map(quote, writers):
        yield f"GRANT USAGE ON SCHEMA {s} TO {role}"
        # Only what a writer fills: neither the id nor the doorbell can be overridden, nor a partition written to.
        yield f"GRANT INSERT (type, key, state, content_type, cause, headers), SELECT (id) ON {s}.entries TO {role}"
        yield f"GRANT SELECT ON {s}.entity_types, {s}.settings TO {role}"
        for function in (
            "put(text, text, jsonb, text, jsonb)",
            "put_bytes(text, text, bytea, text, text, jsonb)",
            "delete(text, text, text, jsonb)",
            "lock(text, text)",
            "check_entry(text, text, integer, jsonb)",
            "app_progress(bigint, jsonb)",
            "ring()",
            "shard_of(text, text)",
            "slot_of(timestamptz)",
        ):
            yield f"GRANT EXECUTE ON FUNCTION {s}.{function} TO {role}"
    if relay is not None:
        role = quote(relay)
        yield f"GRANT USAGE ON SCHEMA {s} TO {role}"
        yield f"GRANT SELECT ON ALL TABLES IN SCHEMA {s} TO {role}"
        yield f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA {s} TO {role}"
        for function in (
            "prune_slot(smallint, jsonb)",
            "adopt(bigint, bigint, bigint, text[])",
            "report(bigint, smallint, jsonb)",
            "shard_of(text, text)",
        ):
            yield f"GRANT EXECUTE ON FUNCTION {s}.{function} TO {role}"


def install(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """Make the newest version in a database that has none; does not commit."""
    connection.execute(create_schema(settings.schema).encode())
    for version in range(1, NEWEST + 1):
        for statement in statements_up(version, settings):
            connection.execute(statement.encode())


def installed_version(connection: psycopg.Connection[Any], schema: str) -> int | None:
    """The version that a database holds; None when there is no outbox in that schema."""
    query = sql.SQL("SELECT schema_version FROM {}.settings").format(sql.Identifier(schema))
    try:
        # A savepoint, or a transaction where there is none: a missing table must not end the caller's.
        with connection.transaction():
            row = connection.execute(query).fetchone()
    except (pg.UndefinedTable, pg.InvalidSchemaName):
        return None
    return None if row is None else int(row[0])


def require(connection: psycopg.Connection[Any], schema: str) -> None:
    """Refuse a database without the newest version; `SchemaError` with the migration to write."""
    found = installed_version(connection, schema)
    if found == NEWEST:
        return
    if found is None:
        raise SchemaError(
            f'There is no outbox in the schema "{schema}" of this database.',
            cure="Create it: outbox migrate --name NAME, or, in a service with Alembic, outbox revision and then "
            "alembic upgrade head.",
        )
    if found > NEWEST:
        raise SchemaError(
            f"The outbox has schema version {found}, this program knows versions up to {NEWEST}.",
            cure="Install a newer version of outbox-publisher.",
        )
    raise SchemaError(
        f"The outbox has schema version {found}, this program needs {NEWEST}.",
        cure="Upgrade it: outbox migrate, or, in a service with Alembic, outbox revision, then alembic upgrade head.",
    )


@cache
def _file(version: int, direction: str) -> tuple[str, ...]:
    if not 1 <= version <= NEWEST:
        raise ConfigError(
            f"There is no version {version} of the outbox's schema.", cure=f"The newest is {NEWEST}, the first is 1."
        )
    text = files("outbox.sql").joinpath("schema", f"{version:03d}_{direction}.sql").read_text("utf-8")
    parts = ("\n".join(_code(part.splitlines())).strip() for part in re.split(r"^--;$", text, flags=re.MULTILINE))
    return tuple(part for part in parts if part)


def _code(lines: Sequence[str]) -> Iterator[str]:
    return (line for line in lines if not line.startswith("--"))
