"""Rows of mapped tables: read and locked past the session, which remembers what may be old."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import orm

Identity = tuple[Any, ...]
Row = tuple[orm.Mapper[Any], Identity]

# Under the limit of parameters of one statement (65,535).
_PARAMETERS = 30_000


def state_of(target: object) -> orm.InstanceState[Any]:
    """What SQLAlchemy knows about an object."""
    return cast("orm.InstanceState[Any]", sa.inspect(target))


def top(mapper: orm.Mapper[Any]) -> orm.Mapper[Any]:
    """The mapper at the base of the inheritance: every object has one row in its table."""
    while mapper.inherits is not None and not mapper.concrete:
        mapper = mapper.inherits
    return mapper


def base_table(mapper: orm.Mapper[Any]) -> sa.Table:
    """The table whose row stands for the object, whatever other tables it has."""
    return cast("sa.Table", top(mapper).primary_key[0].table)


def changed_columns(target: object) -> bool:
    """Whether a flush would write (or has just written) a row of it."""
    state = state_of(target)
    return any(state.attrs[attribute.key].history.has_changes() for attribute in state.mapper.column_attrs)


def may_leave_base(mapper: orm.Mapper[Any]) -> bool:
    """Whether a flush may write an object without the row in its base table: it has others, and no version to count."""
    version = mapper.version_id_col
    counts = version is not None and version.table is base_table(mapper) and mapper.version_id_generator is not False
    return len(mapper.tables) > 1 and not counts


def will_write_base(session: orm.Session, target: object) -> bool:
    """Whether a flush that begins will write the row in the base table, as far as one can tell."""
    if may_leave_base(state_of(target).mapper):
        return writes_base(target)
    # Also for a relationship that was set: its foreign key is not yet.
    return session.is_modified(target, include_collections=False)


def writes_base(target: object) -> bool:
    """Whether a flush writes the row in its base table, so that two that change one object exclude each other."""
    if not changed_columns(target):
        return False
    state = state_of(target)
    mapper = state.mapper
    if not may_leave_base(mapper):
        return True
    table = base_table(mapper)
    return any(
        state.attrs[attribute.key].history.has_changes()
        for attribute in mapper.column_attrs
        if any(getattr(column, "table", None) is table for column in attribute.columns)
    )


def connection_of(session: orm.Session, mapper: orm.Mapper[Any]) -> sa.Connection:
    """The connection on which the session writes objects of a class."""
    return session.connection(bind_arguments={"mapper": mapper})


def in_order(identities: Iterable[Identity]) -> list[Identity]:
    """As the server orders them, where Python can tell."""
    some = list(identities)
    try:
        return sorted(some)
    except TypeError:
        return sorted(some, key=str)


def chunks(identities: Sequence[Identity]) -> Iterator[Sequence[Identity]]:
    """As many as one statement can have parameters for."""
    size = _PARAMETERS // max(1, len(identities[0])) if identities else 1
    return (identities[start : start + size] for start in range(0, len(identities), size))


def among(columns: Sequence[Any], values: Sequence[Identity]) -> sa.ColumnElement[bool]:
    """A condition: the columns hold one of the values."""
    if len(columns) == 1:
        return cast("sa.ColumnElement[bool]", columns[0].in_([value[0] for value in values]))
    return sa.tuple_(*columns).in_(values)


def by_mapper(rows: Iterable[Row]) -> dict[orm.Mapper[Any], list[Identity]]:
    """Rows by their mappers, in an order that is the same in every flush."""
    found: dict[orm.Mapper[Any], dict[Identity, None]] = defaultdict(dict)
    for mapper, identity in rows:
        found[mapper][identity] = None
    names = sorted(found, key=lambda mapper: (mapper.class_.__module__, mapper.class_.__qualname__))
    return {mapper: in_order(found[mapper]) for mapper in names}


def read(
    session: orm.Session,
    mapper: orm.Mapper[Any],
    columns: Sequence[Any],
    identities: Sequence[Identity],
    *,
    lock: bool = False,
) -> list[sa.Row[Any]]:
    """Columns of rows as they are in the database; locked in the order of their keys, if so asked."""
    found: list[sa.Row[Any]] = []
    for some in chunks(identities):
        query = sa.select(*columns).select_from(mapper.persist_selectable).where(among(mapper.primary_key, some))
        if lock:
            # As an UPDATE locks: a foreign key may refer to the row meanwhile.
            query = query.order_by(*mapper.primary_key).with_for_update(key_share=True)
        found += connection_of(session, mapper).execute(query).all()
    return found


def lock(session: orm.Session, rows: Iterable[Row], *, deleting: bool) -> set[Row]:
    """Lock rows of base tables in the order of their keys; those that are there. `deleting`: as a DELETE locks."""
    there: set[Row] = set()
    for mapper, identities in by_mapper(rows).items():
        for some in chunks(identities):
            query = sa.select(*mapper.primary_key).where(among(mapper.primary_key, some))
            query = query.order_by(*mapper.primary_key).with_for_update(key_share=not deleting)
            there |= {(mapper, tuple(row)) for row in connection_of(session, mapper).execute(query)}
    return there
