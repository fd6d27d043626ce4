"""A transaction of a store in SQL: the books of a build, its rows, and what is parked of it."""

from __future__ import annotations

import base64
import datetime as dt
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Table, and_, delete, func, select, tuple_, update
from sqlalchemy import exc as sa
from sqlalchemy.sql.elements import ColumnElement

from outbox.kafka.subscription import Place
from outbox.read_model.change import NONE, Bad, Change, Raw
from outbox.read_model.declared import ENTRY_ID, KEY, Columns, Copy, Follow, Function
from outbox.read_model.dialect import Dialect
from outbox.read_model.rows import key_of, maker
from outbox.read_model.store import Build, Claim, Parked, RefusedError
from outbox.read_model.tables import Books

OF_PLACE = ("model", "build", "topic", "partition")
OF_KEY = ("model", "build", "topic", "key")


class SqlTransaction:
    """See `outbox.read_model.store.Transaction`; and `Tables`, for the service's functions."""

    def __init__(
        self,
        dialect: Dialect,
        connection: Connection,
        books: Books,
        tables: Mapping[str, Table],
        model: str,
        build: Build,
        *,
        reads: bool,
    ) -> None:
        """`tables`: those that this build writes, by the full names of the declared ones."""
        self._dialect = dialect
        self._connection = connection
        self._books = books
        self._tables = tables
        self._name = model
        self._build: Build = build
        self._reads = reads

    # -- for the service's functions ---------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """SQLAlchemy's connection, within the transaction."""
        return self._connection

    def __getitem__(self, table: Table) -> Table:
        return self._tables[table.fullname]

    # -- the model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> str | None:
        """See `Transaction.fingerprint`."""
        models = self._books.models
        query = select(models.c.fingerprint).where(models.c.model == self._name)
        found: str | None = self._connection.execute(query.with_for_update(read=True)).scalar()
        return found

    # -- partitions --------------------------------------------------------------------------------------------

    def _at(self, place: Place) -> Mapping[str, Any]:
        return dict(zip(OF_PLACE, (self._name, self._build, *place), strict=True))

    def _is(self, table: Table, **values: Any) -> ColumnElement[bool]:
        return and_(*(table.c[name] == value for name, value in values.items()))

    def claim(self, place: Place) -> Claim:
        """See `Transaction.claim`."""
        # A swap looks at all partitions: none may be added meanwhile.
        self.fingerprint()
        partitions = self._books.partitions
        here = self._is(partitions, **self._at(place))
        # Two that come first at once: one makes the row, and both raise the epoch, one after the other.
        self._connection.execute(self._dialect.ensure(partitions, {**self._at(place), "next_offset": 0, "epoch": 0}))
        self._connection.execute(update(partitions).where(here).values(epoch=partitions.c.epoch + 1))
        row = self._connection.execute(select(partitions.c.next_offset, partitions.c.epoch).where(here)).one()
        return Claim(row.next_offset, row.epoch)

    def advance(self, place: Place, claim: Claim, offset: int) -> bool:
        """See `Transaction.advance`."""
        partitions = self._books.partitions
        here = self._is(partitions, **self._at(place), epoch=claim.epoch, next_offset=claim.offset)
        return bool(self._connection.execute(update(partitions).where(here).values(next_offset=offset)).rowcount)

    def lock(self, place: Place) -> None:
        """See `Transaction.lock`."""
        partitions = self._books.partitions
        here = self._is(partitions, **self._at(place))
        self._connection.execute(select(partitions.c.epoch).where(here).with_for_update())

    def offsets(self) -> Mapping[Place, int]:
        """See `Transaction.offsets`."""
        partitions = self._books.partitions
        rows = self._connection.execute(
            select(partitions.c.topic, partitions.c.partition, partitions.c.next_offset).where(
                self._is(partitions, model=self._name, build=self._build)
            )
        )
        return {Place(row.topic, row.partition): row.next_offset for row in rows}

    # -- rows --------------------------------------------------------------------------------------------------

    def _of(self, table: Table, follow: Follow, keys: Sequence[str] | None = None) -> ColumnElement[bool]:
        of = self._is(table, model=self._name, build=self._build, topic=follow.topic)
        return of if keys is None else and_(of, self._dialect.among(table.c.key, keys))

    def held(self, follow: Follow, keys: Sequence[str]) -> Mapping[str, int]:
        """See `Transaction.held`."""
        if not self._reads:
            self._dialect.alone(self._connection, f"{self._build} {follow.topic}")
        books, into = self._books.keys, follow.into
        apart = self._connection.execute(select(books.c.key, books.c.entry_id).where(self._of(books, follow, keys)))
        found: dict[str, int] = {row.key: row.entry_id for row in apart}
        if isinstance(into, Copy | Columns) and _keeps_ids(into):
            typed = _typed(into, keys)
            table = self[into.table]
            column, entry_id = table.c[_key_name(into)], table.c[ENTRY_ID]
            rows = self._connection.execute(select(column, entry_id).where(self._dialect.among(column, list(typed))))
            for key, number in rows:
                found[typed[key]] = max(number, found.get(typed[key], NONE))
        return found

    def put(self, follow: Follow, changes: Sequence[Change], held: Mapping[str, int], known: Mapping[str, int]) -> None:
        """See `Transaction.put`."""
        into = follow.into
        with self._refused(), self._connection.begin_nested():
            if isinstance(into, Function):
                into.function(self, changes)
                self._remember(follow, changes, held)
                return
            make, table, names = maker(into), self[into.table], into.columns
            rows = [(change.key in known, make(change, held[change.key])) for change in changes]
            if new := [row for there, row in rows if not there]:
                self._dialect.insert_rows(self._connection, table, names, new)
            if old := [row for there, row in rows if there]:
                self._dialect.upsert_rows(self._connection, table, names, _key_name(into), old)
            if not _keeps_ids(into):
                self._remember(follow, changes, held)
            elif again := [change.key for change in changes if change.key in known]:
                # That they were deleted once.
                self._connection.execute(delete(self._books.keys).where(self._of(self._books.keys, follow, again)))

    def delete(self, follow: Follow, changes: Sequence[Change], held: Mapping[str, int]) -> None:
        """See `Transaction.delete`."""
        into = follow.into
        if isinstance(into, Function):
            raise TypeError("a function is given what was deleted by put()")
        table, typed = self[into.table], _typed(into, [change.key for change in changes])
        with self._refused(), self._connection.begin_nested():
            self._connection.execute(delete(table).where(self._dialect.among(table.c[_key_name(into)], list(typed))))
            self._remember(follow, changes, held)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """Turn what is wrong with the values, or what the service's own code raises, into `RefusedError`."""
        try:
            yield
        except sa.StatementError as error:
            raise self._dialect.translate(error) from error
        except Exception as error:
            if self._connection.invalidated:
                raise
            raise RefusedError(f"{error.__class__.__name__}: {error}"[:500]) from error

    def _remember(self, follow: Follow, changes: Sequence[Change], held: Mapping[str, int]) -> None:
        """Keep the ids of keys apart from the tables."""
        rows = [
            {
                **dict(zip(OF_KEY, (self._name, self._build, follow.topic, change.key), strict=True)),
                "entry_id": held[change.key],
                "deleted": change.deleted,
                "at": int(time.time()),
            }
            for change in changes
            if held[change.key] > 0 or not change.deleted
        ]
        if rows:
            self._connection.execute(self._dialect.upsert(self._books.keys, list(rows[0]), OF_KEY), rows)

    def forget(self, before: dt.datetime) -> int:
        """See `Transaction.forget`."""
        books = self._books.keys
        old = and_(self._is(books, model=self._name, deleted=True), books.c.at < int(before.timestamp()))
        return int(self._connection.execute(delete(books).where(old)).rowcount)

    # -- parked ------------------------------------------------------------------------------------------------

    def park(self, follow: Follow, bad: Sequence[Bad]) -> None:
        """See `Transaction.park`."""
        rows = [
            {
                **dict(zip(OF_KEY, (self._name, self._build, follow.topic, one.key), strict=True)),
                "partition": one.raw.partition,
                "offset": one.raw.offset,
                "entry_id": one.entry_id,
                "timestamp_ms": one.raw.timestamp_ms,
                "raw_key": one.raw.key,
                "value": one.raw.value,
                "headers": [[name, base64.b64encode(value or b"").decode()] for name, value in one.raw.headers],
                "reason": one.reason,
                "parked_at": dt.datetime.now(dt.UTC),
            }
            for one in bad
        ]
        if rows:
            statement = self._dialect.upsert(self._books.parked, list(rows[0]), OF_KEY, kept=["parked_at"])
            self._connection.execute(statement, rows)

    def unpark(self, follow: Follow, applied: Mapping[str, int]) -> None:
        """See `Transaction.unpark`."""
        parked = self._books.parked
        query = select(parked.c.key, parked.c.entry_id).where(self._of(parked, follow, list(applied)))
        done = [key for key, entry_id in self._connection.execute(query) if not 0 < applied[key] < entry_id]
        if done:
            self._connection.execute(delete(parked).where(self._of(parked, follow, done)))

    def parked(
        self,
        topic: str | None = None,
        keys: Sequence[str] | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> Sequence[Parked]:
        """See `Transaction.parked`."""
        parked = self._books.parked
        query = select(parked).where(self._of_topic(topic))
        if keys is not None:
            query = query.where(self._dialect.among(parked.c.key, keys))
        if after is not None:
            query = query.where(tuple_(parked.c.topic, parked.c.key) > tuple_(*after))
        return [
            Parked(
                row.topic,
                row.key,
                row.entry_id,
                row.reason,
                Raw(
                    row.partition,
                    row.offset,
                    row.timestamp_ms,
                    row.raw_key,
                    row.value,
                    [(name, base64.b64decode(value)) for name, value in row.headers],
                ),
                aware(row.parked_at),
            )
            for row in self._connection.execute(query.order_by(parked.c.topic, parked.c.key).limit(limit))
        ]

    def parked_count(self, topic: str | None = None) -> int:
        """See `Transaction.parked_count`."""
        query = select(func.count()).select_from(self._books.parked).where(self._of_topic(topic))
        return int(self._connection.execute(query).scalar_one())

    def _of_topic(self, topic: str | None) -> ColumnElement[bool]:
        of_build = self._is(self._books.parked, model=self._name, build=self._build)
        return of_build if topic is None else and_(of_build, self._books.parked.c.topic == topic)


def aware(time: dt.datetime) -> dt.datetime:
    """SQLite gives back what was UTC without saying so."""
    return time if time.tzinfo else time.replace(tzinfo=dt.UTC)


def _key_name(into: Copy | Columns) -> str:
    return KEY if isinstance(into, Copy) else into.key


def _keeps_ids(into: Copy | Columns) -> bool:
    return ENTRY_ID in into.columns


def _typed(into: Copy | Columns, keys: Sequence[str]) -> dict[Any, str]:
    """Keys by their values in the column, without those that no row can have."""
    convert = key_of(into)
    found = {}
    for key in keys:
        try:
            found[convert(key)] = key
        except (TypeError, ValueError, ArithmeticError):
            continue
    return found
