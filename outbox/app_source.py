"""A backfill by the service's own code, for a state that only that can build.

The relay cannot run it. So it runs in the service's environment, chunk by chunk, each a transaction of its own: the
rows of a chunk are locked, FOR SHARE, so that whoever changes one waits; then the rows and their states are read, in
later statements, and entries are written like any others. What the writer changes afterwards gets a greater id. FOR KEY
SHARE would not do: it lets an UPDATE through, whose state could then get a smaller id than the older one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.sql.elements import ColumnElement

from outbox.errors import ConfigError, EntryError
from outbox.key import KeyPart, key_text
from outbox.state import state_bytes
from outbox.writer import NewEntry, put_many, quoted_in_text

CAUSE = "backfill"
# A row that somebody holds, or a deadlock: the chunk is given up and tried again.
_HELD = ("55P03", "40P01")
_LOCK_MS = 200
_FEW = 256
_PAUSE_SECONDS = 0.2
EXAMPLE = "AppSource('customer', sessions=Session, select=select(Customer), state=build)"
_EXAMPLES = 20


@dataclass(frozen=True)
class AppSource:
    """What `outbox backfill start TYPE --app MODULE:ATTRIBUTE` runs: all rows of an entity type, and their states.

    - `type`: the entity type's name.
    - `sessions`: makes a `Session` (a sessionmaker), one for each chunk; it is committed and closed here, and must be
      in READ COMMITTED.
    - `select`: the rows, one an entity: `select(Customer)`, with conditions and joins as they are needed. Rows are
      locked and read through it; its own order is ignored.
    - `state`: given the session and a row (an ORM object, or what the select's first column is), the full current
      state, or None to publish a tombstone. It is called after the rows are locked, in the same transaction: what it
      reads of other tables is as new as the lock, as long as whoever changes those locks the row as well.
    - `key`: the columns that the key is made of, in the order of their index; None: the entity's primary key.
    """

    type: str
    sessions: Callable[[], AbstractContextManager[orm.Session]]
    select: sa.Select[*tuple[Any, ...]]
    state: Callable[[orm.Session, Any], object]
    key: Sequence[Any] | None = None
    cause: str | None = CAUSE

    def columns(self) -> Sequence[ColumnElement[Any]]:
        """The columns that the key is made of. `ConfigError` when they are not known."""
        if self.key:
            return [sa.inspect(column, raiseerr=True).expression if _mapped(column) else column for column in self.key]
        entity = self._entity
        if entity is None:
            raise ConfigError(
                f'The source of "{self.type}" selects no ORM entity, and names no key.',
                cure="Name the columns that the key is made of: key=(table.c.id,).",
            )
        return list(sa.inspect(entity).primary_key)

    @property
    def mapped(self) -> bool:
        """Whether its rows are objects of the ORM."""
        return self._entity is not None

    @property
    def _entity(self) -> Any:
        described = self.select.column_descriptions
        entity = described[0].get("entity") if described else None
        # The entity itself, not one of its columns.
        return entity if entity is not None and described[0]["expr"] is entity else None

    def lock(self, after: Sequence[str] | None, rows: int) -> sa.Select[*tuple[Any, ...]]:
        """The statement that locks the next rows, and gives their keys; `after` as `Chunk.after` has it.

        It gives nothing else: what it has read of other tables, or computed, is as old as its own beginning, however
        long it has waited for the lock.
        """
        columns = self.columns()
        entity = self._entity
        lock_of = entity if entity is not None else columns[0].table
        keys = self.select.with_only_columns(*columns, maintain_column_froms=True).order_by(None).order_by(*columns)
        if after is not None:
            given = [
                sa.cast(sa.literal(text, sa.Text), column.type) for text, column in zip(after, columns, strict=True)
            ]
            keys = keys.where(sa.tuple_(*columns) > sa.tuple_(*given))
        return keys.limit(rows).with_for_update(read=True, of=lock_of)

    def read(self, keys: Sequence[Sequence[Any]]) -> sa.Select[*tuple[Any, ...]]:
        """The statement that reads the rows of some keys, once they are locked."""
        columns = self.columns()
        rows = self.select.order_by(None).where(sa.tuple_(*columns).in_([tuple(key) for key in keys]))
        rows = rows.add_columns(*(column.label(f"outbox_key_{n}") for n, column in enumerate(columns)))
        # Not what the session may have in its identity map: what is there once the lock is had.
        return rows.execution_options(populate_existing=True)

    def count(self) -> sa.Select[Any]:
        """How many rows there are now."""
        return sa.select(sa.func.count()).select_from(self.select.order_by(None).subquery())


def _mapped(column: Any) -> bool:
    return isinstance(column, orm.attributes.QueryableAttribute)


@dataclass(frozen=True, slots=True)
class Chunk:
    """How far an application's backfill is, after a chunk.

    `rows` in all, `refused` of them without a state, with the first few of their keys and reasons as `examples`;
    `after`: where the next chunk begins, as texts; `done`: nothing is left. `state`: `running`, or `paused` or
    `cancelled` by somebody.
    """

    rows: int = 0
    refused: int = 0
    after: Sequence[str] | None = None
    done: bool = False
    state: str = "running"
    examples: Sequence[tuple[str, str]] = ()

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Chunk:
        """What the control table says."""
        progress = said["progress"] or {}
        return cls(
            progress.get("rows", 0),
            progress.get("refused", 0),
            progress.get("after"),
            progress.get("done", False),
            said["state"],
            [tuple(one) for one in progress.get("examples", ())],
        )

    def told(self) -> dict[str, Any]:
        """What the control table is told."""
        examples = [list(one) for one in self.examples]
        return {
            "rows": self.rows,
            "refused": self.refused,
            "after": self.after,
            "done": self.done,
            "examples": examples,
        }


def run(source: AppSource, number: int, *, schema: str, rows: Callable[[], int]) -> Iterator[Chunk]:
    """Write the entries of a backfill that was asked for as request `number`; after each chunk how far it is.

    What the chunk wrote and how far it is are one transaction: killed, the next run goes on behind it. `rows` is asked
    how many rows the next chunk may have; a chunk that comes upon a row which somebody holds gives its own back, and is
    tried again with fewer. Ends when it is done, paused or cancelled.
    """
    most = sys.maxsize
    while True:
        try:
            with source.sessions() as session:
                chunk = _next(source, session, number, schema, min(most, rows()))
                session.commit()
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in _HELD:
                raise
            most = max(1, min(most, _FEW) // 2)
            time.sleep(_PAUSE_SECONDS)
            continue
        most = min(sys.maxsize, most * 2)
        yield chunk
        if chunk.done or chunk.state != "running":
            return


def _next(source: AppSource, session: orm.Session, number: int, schema: str, rows: int) -> Chunk:
    level = session.execute(sa.text("SHOW transaction_isolation")).scalar_one()
    if level != "read committed":
        raise ConfigError(
            f"The sessions of {source.type}'s source are in {str(level).upper()}: states would be older than the lock.",
            cure="Give it sessions in READ COMMITTED.",
        )
    so_far = Chunk.read(_progress(session, schema, number))
    if so_far.done or so_far.state != "running":
        return so_far
    # Whoever waits for one of these rows waits for all that this transaction waits for.
    session.execute(sa.text(f"SET LOCAL lock_timeout = {_LOCK_MS}"))
    keys = [tuple(key) for key in session.execute(source.lock(so_far.after, rows))]
    entries, refused = _entries(source, session, schema, keys)
    put_many(session, source.type, entries, cause=source.cause, schema=schema)
    texts = _texts(session, keys[-1], source.columns()) if keys else so_far.after
    chunk = replace(
        so_far,
        rows=so_far.rows + len(keys),
        refused=so_far.refused + len(refused),
        after=texts,
        done=len(keys) < rows,
        examples=[*so_far.examples, *refused][:_EXAMPLES],
    )
    _progress(session, schema, number, chunk.told())
    return chunk


def _entries(
    source: AppSource, session: orm.Session, schema: str, keys: Sequence[tuple[KeyPart, ...]]
) -> tuple[list[NewEntry], list[tuple[str, str]]]:
    """What is written for the rows of some keys, and the keys and reasons of those that have no state."""
    if not keys:
        return [], []
    most = session.execute(
        sa.text(f"SELECT max_bytes FROM {quoted_in_text(schema)}.entity_types WHERE name = :name"),
        {"name": source.type},
    ).scalar_one()
    width = len(keys[0])
    result = session.execute(source.read(keys))
    # A collection that is loaded by a join gives a row of its own for each of its parts.
    found = result.unique(lambda row: tuple(row[-width:])).all() if source.mapped else result.all()
    rows = {tuple(row[-width:]): row[0] for row in found}
    entries: list[NewEntry] = []
    refused: list[tuple[str, str]] = []
    for key in keys:
        text = key_text(source.type, key)
        try:
            # Its statements may fail: those of the others must not be lost with them.
            with session.begin_nested():
                state = source.state(session, rows[key])
                written = None if state is None else state_bytes(source.type, text, state)
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) in _HELD:
                raise
            refused.append((text, _reason(error)))
        except Exception as error:  # noqa: BLE001  whatever a service's code raises of one entity is that entity's
            refused.append((text, _reason(error)))
        else:
            if written is not None and len(written) > most:
                refused.append((text, f"its state has {len(written)} bytes, its type allows {most}"))
            else:
                entries.append(NewEntry.tombstone(key) if written is None else NewEntry(key, written))
    return entries, refused


def _reason(error: Exception) -> str:
    return f"{error.__class__.__name__}: {error}"[:300]


def _texts(session: orm.Session, key: tuple[KeyPart, ...], columns: Sequence[ColumnElement[Any]]) -> list[str]:
    """A key's parts as the server writes them, which it reads back whatever their types are."""
    casts = [sa.cast(sa.literal(part, column.type), sa.Text) for part, column in zip(key, columns, strict=True)]
    return list(session.execute(sa.select(*casts)).one())


def _progress(
    session: orm.Session, schema: str, number: int, told: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """What the control table says of the request, which is locked from here on; or tell it."""
    function = sa.text(f"SELECT {quoted_in_text(schema)}.app_progress(:number, CAST(:told AS jsonb))")
    given = {"number": number, "told": None if told is None else orjson.dumps(told).decode()}
    found = session.execute(function, given).scalar_one()
    if found is None:
        raise EntryError(f"The request {number} is gone.", cure="Start it again: outbox backfill start ... --app ...")
    said: Mapping[str, Any] = found if isinstance(found, Mapping) else orjson.loads(found)
    return said
