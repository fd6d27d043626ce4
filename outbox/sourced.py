"""Reading through the types' sources what requests want, within a batch's own transaction.

A source is the owner's own query: a row of it may fail, a migration may break all of it, and neither may hold up what
the log publishes. So each query runs behind a savepoint, a row that fails is found by halving, and what cannot be read
at all is an outcome of the request, not an error of the relay's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import psycopg
from psycopg import errors as pg

from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.errors import ConfigError, DatabaseError, DatabaseUnavailableError
from outbox.key import MAX_KEY_BYTES
from outbox.request import NAMELESS, Entity, Found, Page, Row, Wanted
from outbox.schema import quote
from outbox.source import Source, joined, look, place_of, run_under, set_locally

# What a smaller page may be free of: errors of a row, by their SQLSTATE classes (data, cardinality, a constraint of a
# domain, RAISE).
_OF_A_ROW = ("21", "22", "23", "P0")
# Errors of the server's moment: a transaction that is rolled back, resources, a lock.
_OF_A_MOMENT = ("40", "53", "55P03")
# Live changes wait meanwhile: a query that takes longer ends its request, one that waits for a lock comes later.
_MOST_MS = 10_000
_LOCK_MS = 250
# The keys of so many entries are looked up at once: few at first, then as many as they are small and quick.
_LIVE_LEAST, _LIVE = 50, 2_000
_LIVE_SECONDS = 1.0
# A key of so many characters fits, whatever they are.
_SURELY_SHORT = MAX_KEY_BYTES // 4
# Of so many rows it is looked at whether the key is made of the columns that it is said to be made of.
_SAMPLE = 100
# What the relay's session has switched off for its own queries, and how long a lock is waited for.
_GRANTED = {
    **dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_incremental_sort"), "on"),
    "plan_cache_mode": "auto",
    "lock_timeout": str(_LOCK_MS),
}


class _UnreadableError(Exception):
    """A source that cannot be read, and why."""


class _LaterError(Exception):
    """A query that the server could not answer now: of memory, of a lock, of a deadlock. Another time it may."""


class _QueryError(_UnreadableError):
    """A query that the server answered with an error; `of_a_row`: a smaller one may be free of it."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__((error.diag.message_primary or str(error)).strip())
        self.of_a_row = (error.sqlstate or "")[:2] in _OF_A_ROW
        if isinstance(error, pg.QueryCanceled):
            self.args = (f"it took longer than {_MOST_MS // 1000} s: see EXPLAIN, or name the columns of an index",)


class Sources:
    """The sources of one connection. `schema` is the outbox's; of `shards` only `shard` is read."""

    def __init__(self, schema: str, *, shard: int, shards: int) -> None:
        self._of_shard = "" if shards == 1 else f"{quote(schema)}.shard_of(%(type)s, s.key::text) = {shard}"
        self._not_mine = (
            f"SELECT place FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w (type, key, place)"
            f" WHERE {quote(schema)}.shard_of(type, key) <> {shard}"
        ).encode()
        self._known: dict[str, Source] = {}

    def find(
        self,
        connection: Connection,
        wanted: Wanted,
        types: Mapping[str, EntityType],
        retained: Sequence[Entry],
        found: Found,
    ) -> Found:
        """Read what is wanted; `retained` and `found`, a page of the log, were read already.

        Raises psycopg's errors of a server that is lost.
        """
        errors: dict[str, str] = dict(found.errors)
        later: set[str] = set()
        current: list[Row] = []
        page, identity, more, page_seconds = found.page, found.source, found.more, found.page_seconds
        elsewhere = self._elsewhere(connection, [*wanted.current, *wanted.retained], types)
        by_type: dict[str, list[str]] = defaultdict(list)
        for name, key in wanted.current:
            if (name, key) not in elsewhere:
                by_type[name].append(key)
        if wanted.current or wanted.page:
            _prepare(connection)
        for name, keys in by_type.items():
            try:
                current += self._rows(connection, name, self._source(connection, name, types), keys)
            except _LaterError:
                later.add(name)
            except _UnreadableError as error:
                errors[name] = str(error)
        if wanted.page is not None and wanted.page.history is None and wanted.page.type not in later:
            name, began = wanted.page.type, time.monotonic()
            try:
                source = self._source(connection, name, types)
                page, identity, more = self._page(connection, source, wanted.page, types[name].written_as)
                page_seconds = time.monotonic() - began
            except _LaterError:
                later.add(name)
            except _UnreadableError as error:
                errors[name] = str(error)
        looked_for = frozenset((*wanted.current, *wanted.retained))
        return replace(
            found,
            retained=retained,
            current=current,
            page=page,
            source=identity,
            paged=wanted.page,
            more=more,
            page_seconds=page_seconds,
            errors=errors,
            elsewhere=elsewhere,
            looked_for=looked_for,
            later=later,
        )

    def live(
        self, connection: Connection, entries: Sequence[Entry], types: Mapping[str, EntityType], *, most: int
    ) -> tuple[list[Row], int | None]:
        """What the types that read their sources publish of entries, in id order: each key once, as it is now.

        Up to some `most` bytes, and about a second; then the id of the last entry that it goes up to, otherwise None.
        Raises `DatabaseError` when a source cannot be read, `DatabaseUnavailableError` when it cannot be now, and
        psycopg's errors of a server that is lost.
        """
        began = time.monotonic()
        reading: dict[str, list[EntityType]] = defaultdict(list)
        for of in types.values():
            if of.reads_source:
                reading[of.written_as].append(of)
        _prepare(connection)
        read: dict[Entity, list[Row]] = {}
        last: dict[Entity, Entry] = {}
        size, upto = 0, None
        begin, at_once = 0, _LIVE_LEAST
        while begin < len(entries):
            some = entries[begin : begin + at_once]
            before, started = size, time.monotonic()
            for entry in some:
                if entry[1] in reading:
                    last[entry[1], entry[2]] = entry
            new = [entity for entity in dict.fromkeys((entry[1], entry[2]) for entry in some) if entity in last]
            new = [entity for entity in new if entity not in read]
            for written_as, types_of_it in reading.items():
                keys = [key for name, key in new if name == written_as]
                for of in types_of_it if keys else ():
                    try:
                        rows = self._rows(connection, of.name, self._source(connection, of.name, types), keys)
                    except _UnreadableError as error:
                        raise _unreadable(of, error) from error
                    except _LaterError as error:
                        raise DatabaseUnavailableError(
                            f'The source of "{of.name}" cannot be read now: {error}.', cure="It is tried again."
                        ) from error
                    for key, row in zip(keys, rows, strict=True):
                        read.setdefault((written_as, key), []).append(row)
                        size += len(row.entry.state or b"")
            begin += len(some)
            if (size >= most or time.monotonic() - began > _LIVE_SECONDS) and begin < len(entries):
                upto = some[-1][0]
                break
            # As many as would make a tenth of what a batch may hold, or take a tenth of its time.
            share = 10 * max((size - before) / most, (time.monotonic() - started) / _LIVE_SECONDS)
            at_once = max(_LIVE_LEAST, min(_LIVE, round(at_once / max(share, 0.25))))
        # A row of its own for each change: that of a key which changed again is published with the last of them.
        live = [_of_change(row, last[entity]) for entity, rows in read.items() for row in rows]
        return sorted(live, key=lambda row: row.entry.id), upto

    def _elsewhere(
        self, connection: Connection, entities: Sequence[Entity], types: Mapping[str, EntityType]
    ) -> set[Entity]:
        """Which of some entities are another shard's."""
        if not (self._of_shard and entities):
            return set()
        written = [types[name].written_as if name in types else name for name, _ in entities]
        rows = connection.execute(self._not_mine, [written, [key for _, key in entities]])
        return {entities[place - 1] for (place,) in rows}

    def _source(self, connection: Connection, name: str, types: Mapping[str, EntityType]) -> Source:
        entity_type = types.get(name)
        if entity_type is None or entity_type.source is None:
            raise _UnreadableError(f'the entity type "{name}" has no source')
        run_under(connection, derived=entity_type.derived)
        known = self._known.get(entity_type.source)
        if known is None:
            try:
                known = look(connection, name, entity_type.source)
            except ConfigError as error:
                cause = error.__cause__
                if isinstance(cause, psycopg.Error) and _passes(cause):
                    raise _LaterError(cause.diag.message_primary) from error
                raise _UnreadableError(str(error)) from error
            # A row that is looked up by those columns and not found would get a tombstone.
            sample = _ask(connection, known.page(after=False, bare=True), {"rows": _SAMPLE}) if known.made_of else []
            for key, *_, at in sample:
                if joined(place_of(at)) not in {key, None}:
                    columns = ", ".join(column.name for column in known.order)
                    raise _UnreadableError(f"its key {key} is not made of {columns}, joined with colons")
            self._known[entity_type.source] = known
        return known

    def _page(
        self, connection: Connection, source: Source, asked: Page, written_as: str
    ) -> tuple[Sequence[Row], str, bool]:
        """The rows of a page, as many as can be read at once, what they are of, and whether there may be more."""
        identity = _identity(source, asked.where)
        if asked.after is not None and (asked.source != identity or len(asked.after) != len(source.order)):
            raise _UnreadableError("its source was changed meanwhile: start it again")
        arguments: dict[str, Any] = {f"after_{n}": text for n, text in enumerate(asked.after or ())}
        # The share of a key is that of its entries.
        arguments |= {"type": written_as, "rows": asked.rows}

        def query(*, bare: bool) -> str:
            return source.page(after=asked.after is not None, where=asked.where, bare=bare, of_shard=self._of_shard)

        while True:
            try:
                found = _ask(connection, query(bare=False), arguments)
            except _QueryError as error:
                if not error.of_a_row:
                    raise
                if arguments["rows"] > 1:
                    arguments["rows"] //= 2
                    continue
                # The next row alone, without its state; it may be another one that the server computed, and failed at.
                bare = _ask(connection, query(bare=True), arguments)
                if not bare:
                    raise
                return [self._alone(connection, asked.type, source, bare[0], error)], identity, True
            return _made(asked.type, found), identity, len(found) == arguments["rows"]

    def _alone(self, connection: Connection, name: str, source: Source, bare: Sequence[Any], error: Exception) -> Row:
        """A row by its key, and why it has no state; the request ends where it is another's that fails."""
        row = _row(name, *bare, failure=str(error))
        for there in self._there(connection, name, source, [row.entry.key]):
            return there
        raise error

    def _rows(self, connection: Connection, name: str, source: Source, keys: Sequence[str]) -> list[Row]:
        """The rows of some keys, in their order; one without a state for a key that is gone."""
        there = {row.entry.key: row for row in self._there(connection, name, source, keys)}
        return [there.get(key) or Row(Entry(0, name, key, None, _now_ms())) for key in keys]

    def _there(self, connection: Connection, name: str, source: Source, keys: Sequence[str]) -> list[Row]:
        arguments = source.looked_up(keys)
        failure = None
        if arguments is not None:
            try:
                return _made(name, _ask(connection, source.rows_of(), arguments))
            except _QueryError as error:
                if not error.of_a_row:
                    raise
                failure = str(error)
        if len(keys) > 1:
            half = len(keys) // 2
            halves = (keys[:half], keys[half:])
            return [row for half_of_them in halves for row in self._there(connection, name, source, half_of_them)]
        if arguments is None:
            return []  # a key of other parts than the source has columns
        if source.made_of:
            try:
                _ask(connection, source.casts(), arguments)
            except _QueryError:
                return []  # no row has a key that its columns cannot hold
        bare = _ask(connection, source.rows_of(bare=True), arguments)
        return [_row(name, *one, failure=failure) for one in bare]


def _unreadable(of: EntityType, error: _UnreadableError) -> DatabaseError:
    if of.follows:
        cure = f"Mend it (outbox types change {of.name} --source ...), or end it: outbox topics retire {of.topic}."
    else:
        cure = f"Mend it (outbox types change {of.name} --source ...), or publish what is written (--no-reads-source)."
    return DatabaseError(f'The source of the entity type "{of.name}" cannot be read: {error}.', cure=cure)


def _of_change(row: Row, entry: Entry) -> Row:
    """A row that was looked up because of a change: what it says, under that change's name."""
    number, _, _, _, created_ms, _, cause, headers = entry
    mine = row.entry
    return row._replace(
        entry=mine._replace(
            id=number, created_ms=created_ms, cause=cause or mine.cause, headers=headers or mine.headers
        )
    )


def _identity(source: Source, where: str | None) -> str:
    """What a page is of: another source, order or condition is another."""
    told = [source.query, where, *(f"{column.name} {column.type}" for column in source.order)]
    return blake2b(repr(told).encode(), digest_size=8).hexdigest()


def _prepare(connection: Connection) -> None:
    """Set, until the transaction ends, what the relay grants a source beside `run_under`."""
    set_locally(connection, _GRANTED)
    # The session's own limit, where it is smaller.
    connection.execute(
        b"SELECT set_config('statement_timeout', least(%d, nullif(setting::int, 0))::text, true)"
        b" FROM pg_settings WHERE name = 'statement_timeout'" % _MOST_MS
    )


def _passes(error: psycopg.Error) -> bool:
    return (error.sqlstate or "").startswith(_OF_A_MOMENT)


def _ask(connection: Connection, query: str, arguments: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Run a query behind a savepoint; `_QueryError` for its own errors, psycopg's for a server that is lost."""
    connection.execute("SAVEPOINT source")
    try:
        found = connection.cursor(binary=True).execute(query.encode(), arguments).fetchall()
    except psycopg.Error as error:
        if connection.closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
            raise
        connection.execute("ROLLBACK TO SAVEPOINT source")
        if _passes(error):
            raise _LaterError((error.diag.message_primary or str(error)).strip()) from error
        raise _QueryError(error) from error
    connection.execute("RELEASE SAVEPOINT source")
    return found


def _made(name: str, found: Sequence[Sequence[Any]]) -> list[Row]:
    now = _now_ms()
    rows: list[Row] = []
    for key, state, content_type, cause, headers, at in found:
        if state is None or not key or len(key) > _SURELY_SHORT:
            rows.append(_row(name, key, state, content_type, cause, headers, at))
        else:
            rows.append(Row(Entry(0, name, key, state, now, content_type, cause, headers), place_of(at)))
    return rows


def _row(
    name: str,
    key: str | None,
    state: bytes | None,
    content_type: str | None,
    cause: str | None,
    headers: str | None,
    at: Any,
    *,
    failure: str | None = None,
) -> Row:
    usable = bool(key) and len((key or "").encode()) <= MAX_KEY_BYTES
    if not usable:
        failure = f"its key is null, empty or longer than {MAX_KEY_BYTES} bytes"
    elif failure is None and state is None:
        failure = "its state is null"
    place = place_of(at)
    if not usable:
        # The place says which row it is.
        key = f"{NAMELESS}{':'.join(map(str, place))[:200]})"
    return Row(Entry(0, name, key or "", state, _now_ms(), content_type, cause, headers), place, failure)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
