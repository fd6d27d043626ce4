"""A type's source: the query of all keys and states, as the domain's tables have them now.

It has the columns `key` and `state`, and may have `headers`, `cause` and `content_type` (of a state that is no JSON).
Whatever columns it has beside those are the ones that the key is made of, as the table has them, in the order of their
index:

    SELECT id::text AS key, to_jsonb(t) AS state, id FROM customer t

By those it is read in pages and looked up; without any, by `key` itself. An expression like `id::text` has hardly ever
an index, so that each page would sort the whole table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import psycopg

from outbox.capture import SEARCH_PATH, TEXT_SETTINGS
from outbox.database import Connection
from outbox.errors import ConfigError
from outbox.schema import literal, quote

EXAMPLE = "SELECT id::text AS key, to_jsonb(t) AS state, id FROM customer t"
_OWN = ("key", "state", "headers", "cause", "content_type")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a source: its name, and its type as SQL writes it."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Source:
    """A source that was looked at. `columns` in the query's order; `order` are those that it is paged by."""

    query: str
    columns: Sequence[Column]

    @property
    def order(self) -> Sequence[Column]:
        """The columns that the key is made of; the key itself where the query has none."""
        return self.made_of or [column for column in self.columns if column.name == "key"]

    @property
    def made_of(self) -> Sequence[Column]:
        """The columns that the key is made of, in its order; empty where the query has none beside the key."""
        return [column for column in self.columns if column.name not in _OWN]

    def page(self, *, after: bool, where: str | None = None, bare: bool = False, of_shard: str = "") -> str:
        """The query of the next page, in the order of its index; per cent signs are doubled, as psycopg wants it.

        Its columns: key, state in bytes, content type, cause, headers (a JSON object's text; these three are null where
        the query has none), and last where the page ended, as a text, or for several columns an array of them: given as
        `after_0`, `after_1` ... to the next page. `after`: whether there was one before it. `where`: a condition over
        the source's columns. `bare`: without the state. `of_shard`: a further condition, over `s.key`. `rows`: how many
        at the most.
        """
        conditions = [] if where is None else [f"({_doubled(where)}\n)"]
        if after:
            given = ", ".join(f"%(after_{n})s::{column.type}" for n, column in enumerate(self.order))
            conditions.append(f"({self._order}) > ({given})")
        if of_shard:
            conditions.append(of_shard)
        condition = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return f"{self._select(bare=bare)}{condition} ORDER BY {self._order} LIMIT %(rows)s"

    def every(self, *, of: str | None = None) -> str:
        """The query of all rows, in no order, with the columns of `page`; `of`: a condition over `s.key`."""
        return self._select(bare=False) + (f" WHERE {of}" if of is not None else "")

    def count(self) -> str:
        """The query of how many rows there are."""
        return f"SELECT count(*) FROM (\n{_doubled(self.query)}\n) AS s"

    def rows_of(self, *, bare: bool = False) -> str:
        """The query of the rows of some keys, with the columns of `page`; see `looked_up` for what is given to it."""
        made_of = self.made_of
        if not made_of:
            return f"{self._select(bare=bare)} WHERE s.key::text = ANY (%(keys)s::text[])"
        # A condition of this form goes into a query that groups or is distinct; a join does not.
        if len(made_of) == 1:
            column = made_of[0]
            return f"{self._select(bare=bare)} WHERE s.{quote(column.name)} = ANY (%(part_0)s::text[]::{column.type}[])"
        parts = ", ".join(f"%(part_{n})s::text[]::{column.type}[]" for n, column in enumerate(made_of))
        names = ", ".join(f"part_{n}" for n in range(len(made_of)))
        same = " AND ".join(f"s.{quote(column.name)} = w.part_{n}" for n, column in enumerate(made_of))
        return f"{self._select(bare=bare)} JOIN unnest({parts}) AS w ({names}) ON {same}"

    def looked_up(self, keys: Sequence[str]) -> Mapping[str, Sequence[str]] | None:
        """What `rows_of` is given for keys; None when one of them cannot be made of the source's columns."""
        if not self.made_of:
            return {"keys": list(keys)}
        split = [split_key(key, len(self.made_of)) for key in keys]
        if any(parts is None for parts in split):
            return None
        return {f"part_{n}": [parts[n] for parts in split if parts] for n in range(len(self.made_of))}

    @property
    def key_made(self) -> str:
        """An expression: the key that the columns make, which must be the source's `key`; null where one is null."""
        texts = [f"s.{quote(column.name)}::text" for column in self.order]
        if len(texts) == 1:
            return texts[0]
        escaped = (rf"replace(replace({text}, '\', '\\'), ':', '\:')" for text in texts)
        return " || ':' || ".join(escaped)

    def casts(self) -> str:
        """A query that fails when a key's parts cannot be values of the columns that the key is made of."""
        return "SELECT " + ", ".join(f"%(part_{n})s::text[]::{column.type}[]" for n, column in enumerate(self.made_of))

    def _select(self, *, bare: bool) -> str:
        there = {column.name: column.type for column in self.columns}
        state = "NULL::bytea"
        if not bare:
            state = "s.state" if there["state"] == "bytea" else "convert_to(s.state::text, 'UTF8')"
        told = ", ".join(
            f"{f's.{name}' if name in there else 'NULL'}::text AS {name}"
            for name in ("content_type", "cause", "headers")
        )
        at = ", ".join(f"s.{quote(column.name)}::text" for column in self.order)
        # An array costs a third of what the rest of a row does.
        where = at if len(self.order) == 1 else f"ARRAY[{at}]"
        return f"SELECT s.key::text, {state} AS state, {told}, {where} AS at FROM (\n{_doubled(self.query)}\n) AS s"

    @property
    def _order(self) -> str:
        return ", ".join(f"s.{quote(column.name)}" for column in self.order)


def digest(query: str | None) -> str:
    """What tells one source from another."""
    return blake2b((query or "").encode(), digest_size=8).hexdigest()


def joined(parts: Sequence[str | None]) -> str | None:
    """The key that these texts of columns make, as `outbox.key.key_text` joins them; None where one is null."""
    if None in parts:
        return None
    texts = [part or "" for part in parts]
    if len(texts) == 1:
        return texts[0]
    return ":".join(text.replace("\\", "\\\\").replace(":", "\\:") for text in texts)


def split_key(key: str, parts: int) -> list[str] | None:
    """The parts of a key's text, as `outbox.key.key_text` joined them; None when it has not as many."""
    if parts == 1:
        return [key]
    found, escaped = [""], False
    for character in key:
        if not escaped and character == "\\":
            escaped = True
            continue
        if not escaped and character == ":":
            found.append("")
        else:
            found[-1] += character
        escaped = False
    return found if len(found) == parts and not escaped else None


def place_of(at: Any) -> Sequence[str]:
    """Where a page ends after a row, a text for each column of its order, by the row's last column."""
    return at if isinstance(at, list) else (at,)


def _doubled(query: str) -> str:
    return query.replace("%", "%%")


def run_under(connection: Connection, *, derived: bool) -> None:
    """Set, until the transaction ends, what a source is run under; `derived`: it is of a capture."""
    set_locally(connection, TEXT_SETTINGS)
    connection.execute(f"SET LOCAL search_path TO {SEARCH_PATH if derived else 'DEFAULT'}".encode())


def set_locally(connection: Connection, settings: Mapping[str, str]) -> None:
    """Set these until the transaction ends, in one round trip: each page of a backfill does so."""
    each = ", ".join(f"set_config({literal(name)}, {literal(value)}, true)" for name, value in settings.items())
    connection.execute(f"SELECT {each}".encode())


def look(connection: Connection, name: str, query: str) -> Source:
    """Look at a source's columns, in a transaction that reads only; `ConfigError` when it is none."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute("SET TRANSACTION READ ONLY")
            cursor = connection.execute(f"SELECT * FROM (\n{query}\n) AS source LIMIT 0".encode())
            described = cursor.description or ()
            types = connection.execute(
                "SELECT format_type(t, -1) FROM unnest(%s::oid[]) WITH ORDINALITY AS n (t, place) ORDER BY place",
                [[column.type_code for column in described]],
            ).fetchall()
    except psycopg.Error as error:
        raise ConfigError(
            f'The source of the entity type "{name}" is no query that can be read: '
            f"{error.diag.message_primary or error}.",
            cure=f"Give one like: {EXAMPLE}.",
        ) from error
    found = [Column(column.name, row[0]) for column, row in zip(described, types, strict=True)]
    names = [column.name for column in found]
    if {"key", "state"} - set(names) or len(set(names)) < len(names):
        raise ConfigError(
            f'The source of the entity type "{name}" has the columns {", ".join(names)}.',
            cure="It needs key and state, and may have headers, cause, content_type, and the columns that the key is "
            f"made of: {EXAMPLE}.",
        )
    return Source(query, found)


def check_state(name: str, source: Source) -> None:
    """Refuse states that would be published as JSON and are none."""
    there = {column.name: column.type for column in source.columns}
    if there["state"] not in {"json", "jsonb", "bytea"} and "content_type" not in there:
        raise ConfigError(
            f'The state in the source of the entity type "{name}" is {there["state"]}, which is no JSON.',
            cure="Make it json, jsonb or bytea (to_jsonb(t.*) AS state), or say: 'text/plain' AS content_type.",
        )


def slow_pages(connection: Connection, source: Source) -> str | None:
    """Why each page of a source costs more than the one before, in words; None when an index gives its order.

    The planner tells, for a table as large as its statistics have it: a small one is read as a whole, and rightly.
    """
    arguments: Mapping[str, Any] = {"rows": 1000}
    with connection.transaction(force_rollback=True):
        connection.execute("SET TRANSACTION READ ONLY")
        # A table without statistics looks small; what can be done with an index is what is asked for.
        for setting in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
            connection.execute(f"SET LOCAL {setting} = off".encode())
        row = connection.execute(
            f"EXPLAIN (FORMAT JSON, COSTS off) {source.page(after=False)}".encode(), arguments
        ).fetchone()
    nodes = list(_nodes(row[0][0]["Plan"])) if row else []
    if not any(node in {"Sort", "Incremental Sort"} for node in nodes):
        return None
    by = ", ".join(column.name for column in source.order)
    return f"no index gives the order of {by}: each page sorts the whole source"


def _nodes(plan: Mapping[str, Any]) -> Iterator[str]:
    yield plan["Node Type"]
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
