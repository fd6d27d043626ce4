"""Putting a new build's rows into the place of those that are served; rows that are the same are not touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, Index, Table, UniqueConstraint, and_, delete, or_, select, text
from sqlalchemy.schema import sort_tables

from outbox.read_model.dialect import Dialect


def replace(dialect: Dialect, connection: Connection, shadows: Mapping[str, Table], tables: Sequence[Table]) -> None:
    """Make the rows of tables those of their copies, which `shadows` has by the tables' full names."""
    in_order = sort_tables(tables)
    for table in reversed(in_order):
        _delete(connection, table, shadows[table.fullname])
    for table in in_order:
        _write(dialect, connection, table, shadows[table.fullname])


def is_emptied(connection: Connection, table: Table, shadow: Table) -> bool:
    """Whether a table has rows, and its copy none."""

    def has_rows(one: Table) -> bool:
        return connection.execute(select(text("1")).select_from(one).limit(1)).fetchone() is not None

    return has_rows(table) and not has_rows(shadow)


def _delete(connection: Connection, live: Table, new: Table) -> None:
    """Rows that are gone; and those that hold what others want: a unique value, a row that they referred to."""
    same = [live.c[column.name] == new.c[column.name] for column in live.primary_key]
    same += [live.c[name].is_not_distinct_from(new.c[name]) for name in _holding(live)]
    there = select(text("1")).select_from(new).where(and_(*same)).correlate(live).exists()
    connection.execute(delete(live).where(~there))


def _write(dialect: Dialect, connection: Connection, live: Table, new: Table) -> None:
    keys = [column.name for column in live.primary_key]
    names = [column.name for column in new.columns if column.computed is None and column.identity is None]
    rest = [name for name in names if name not in keys]
    # SQLite takes ON CONFLICT for a join's condition where the SELECT has no WHERE.
    rows = select(*(new.c[name] for name in names)).where(text("1 = 1"))
    made = dialect.insert(live).from_select(names, rows)
    if not rest:
        connection.execute(made.on_conflict_do_nothing())
        return
    differs = or_(*(live.c[name].is_distinct_from(made.excluded[name]) for name in rest))
    connection.execute(
        made.on_conflict_do_update(
            index_elements=keys,
            set_={name: made.excluded[name] for name in rest},
            where=differs if all(dialect.has_equality(live.c[name]) for name in rest) else None,
        )
    )


def _holding(table: Table) -> list[str]:
    """The columns beside the primary key that something unique is made of, and those that refer to a table."""
    found = dict.fromkeys(column.name for column in table.columns if column.foreign_keys)
    for one in [*table.constraints, *table.indexes]:
        if isinstance(one, UniqueConstraint) or (isinstance(one, Index) and one.unique):
            found |= dict.fromkeys(column.name for column in one.columns)
    return [name for name in found if name not in table.primary_key.columns]
