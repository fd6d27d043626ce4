"""From parts to roots: which roots a flush touches, and how they are updated.

Locks are taken from above: roots first, in the order of their keys, then parts. A flush that changes a part and one
that deletes its root then meet at the root.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import orm

from outbox.errors import ConfigError
from outbox.orm.publication import derived, part_mappers, publications_at, ways_of
from outbox.orm.rows import (
    Identity,
    Row,
    among,
    base_table,
    by_mapper,
    chunks,
    connection_of,
    read,
    state_of,
    top,
)


def way(mapper: orm.Mapper[Any], name: str) -> tuple[orm.Mapper[Any], dict[str, str]]:
    """The class that a relationship leads to; the attributes of the foreign key with those that it refers to."""
    relationship = mapper.relationships.get(name)
    if relationship is None or relationship.direction is not orm.MANYTOONE:
        raise ConfigError(
            f"{mapper.class_.__qualname__}.{name} is no many-to-one relationship.",
            cure='outbox.part_of takes the name of the relationship to the root: @outbox.part_of("order").',
        )
    return relationship.mapper, {
        mapper.get_property_by_column(local).key: relationship.mapper.get_property_by_column(remote).key
        for local, remote in relationship.local_remote_pairs or ()
    }


# A class of parts, the class it leads to, the pairs of columns by which it does.
Link = tuple[orm.Mapper[Any], orm.Mapper[Any], Sequence[tuple[Any, Any]]]

_links: WeakKeyDictionary[orm.Mapper[Any], list[Link]] = derived()
_collections: WeakKeyDictionary[orm.Mapper[Any], list[orm.RelationshipProperty[Any]]] = derived()


def links_to(mapper: orm.Mapper[Any]) -> list[Link]:
    """How parts lead to a class, to its bases or to its subclasses."""
    if mapper not in _links:
        _links[mapper] = list(_find_links(mapper))
    return _links[mapper]


def _find_links(mapper: orm.Mapper[Any]) -> Iterator[Link]:
    for part in part_mappers():
        for name in ways_of(part.class_):
            relationship = part.relationships.get(name)
            if relationship is None or relationship.direction is not orm.MANYTOONE:
                continue
            if relationship.mapper.isa(mapper) or mapper.isa(relationship.mapper):
                yield part, relationship.mapper, relationship.local_remote_pairs or ()


def collections_of(mapper: orm.Mapper[Any]) -> list[orm.RelationshipProperty[Any]]:
    """The one-to-many relationships of a class, and of its subclasses, that hold its parts."""
    if mapper not in _collections:
        _collections[mapper] = _find_collections(mapper)
    return _collections[mapper]


def _find_collections(mapper: orm.Mapper[Any]) -> list[orm.RelationshipProperty[Any]]:
    columns = [(part, {local for local, _ in pairs}) for part, _, pairs in links_to(mapper)]
    if not columns:
        return []
    found: list[orm.RelationshipProperty[Any]] = []
    for each in mapper.self_and_descendants:
        for relationship in each.relationships:
            remote = {column for _, column in relationship.local_remote_pairs or ()}
            # A subclass has the relationships of its base once more.
            inherited = (
                each is not mapper and each.inherits is not None and relationship.key in each.inherits.relationships
            )
            if (
                relationship.direction is orm.ONETOMANY
                and not inherited
                and any(
                    remote == local and (relationship.mapper.isa(part) or part.isa(relationship.mapper))
                    for part, local in columns
                )
            ):
                found.append(relationship)
    return found


# -- upwards ---------------------------------------------------------------------------------------------------------


def new_parents(session: orm.Session, target: object) -> set[Row]:
    """Where a part leads to as the session has it: through the object, or the value of the foreign key alone."""
    state = state_of(target)
    found: set[Row] = set()
    for name in ways_of(target.__class__):
        target_mapper, columns = way(state.mapper, name)
        if state.persistent and not any(state.attrs[key].history.has_changes() for key in (name, *columns)):
            # What is not changed may be old; the row tells.
            continue
        parent = state.dict.get(name)
        if parent is not None:
            parent_state = state_of(parent)
            if parent_state.identity is not None:
                found.add((parent_state.mapper, tuple(parent_state.identity)))
        values = tuple(state.dict.get(key) for key in columns)
        found |= _identified(session, target_mapper, columns, [values])
    return found


def old_parents(session: orm.Session, target: object) -> set[Row]:
    """Where a part led to before the flush, as far as the session knows."""
    state = state_of(target)
    found: set[Row] = set()
    for name in ways_of(target.__class__):
        target_mapper, columns = way(state.mapper, name)
        values = []
        for key in columns:
            history = state.attrs[key].history
            values.append(history.deleted[0] if history.deleted else state.dict.get(key))
        found |= _identified(session, target_mapper, columns, [tuple(values)])
    return found


def parents(session: orm.Session, parts: Iterable[Row], *, lock: bool = False) -> set[Row]:
    """Where parts lead to as their rows are now. `lock`: they cannot move any more."""
    found: set[Row] = set()
    for mapper, identities in by_mapper(parts).items():
        ways = [way(mapper, name) for name in ways_of(mapper.class_)]
        names = list(dict.fromkeys(key for _, columns in ways for key in columns))
        columns = [mapper.column_attrs[key].columns[0] for key in names]
        rows = read(session, mapper, columns, identities, lock=lock)
        for target_mapper, pairs in ways:
            places = [names.index(key) for key in pairs]
            found |= _identified(session, target_mapper, pairs, {tuple(row[place] for place in places) for row in rows})
    return found


def _identified(
    session: orm.Session, mapper: orm.Mapper[Any], columns: Mapping[str, str], values: Iterable[Sequence[Any]]
) -> set[Row]:
    """The identities of the rows that foreign keys refer to."""
    # A SQL expression as a foreign key is known after the flush.
    known = [
        tuple(value)
        for value in values
        if not any(part is None or isinstance(part, sa.ClauseElement) for part in value)
    ]
    primary = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    remote = list(columns.values())
    if set(remote) == set(primary):
        return {(mapper, tuple(value[remote.index(key)] for key in primary)) for value in known}
    if not known:
        return set()
    query = sa.select(*mapper.primary_key).select_from(mapper.persist_selectable)
    query = query.where(among([mapper.column_attrs[key].columns[0] for key in remote], known))
    return {(mapper, tuple(row)) for row in connection_of(session, mapper).execute(query)}


def climb(session: orm.Session, found: Iterable[Row], *, without: Iterable[Row] = ()) -> tuple[set[Row], set[Row]]:
    """From parts of parts up to what is published: the roots, and the parts on the way.

    `without`: rows above which nobody needs to look.
    """
    roots: set[Row] = set()
    on_the_way: set[Row] = set()
    seen: set[Row] = set(without)
    waiting = set(found)
    while waiting:
        roots |= {(top(mapper), identity) for mapper, identity in waiting if publications_at(mapper)}
        above = {row for row in waiting - seen if ways_of(row[0].class_)}
        on_the_way |= above
        seen |= waiting
        waiting = parents(session, above) - seen
    return roots, on_the_way


# -- downwards -------------------------------------------------------------------------------------------------------


def parts_below(session: orm.Session, rows: Iterable[Row]) -> set[Row]:
    """All parts of some rows, and the parts of those, as the database has them."""
    found: set[Row] = set()
    waiting = set(rows)
    while waiting:
        below: set[Row] = set()
        for mapper, identities in by_mapper(waiting).items():
            for link in links_to(mapper):
                below |= {(link[0], identity) for identity in _below(session, identities, link)}
        waiting = below - found
        found |= below
    return found


def _below(session: orm.Session, identities: Sequence[Identity], link: Link) -> Iterator[Identity]:
    part, mapper, pairs = link
    local = [column for column, _ in pairs]
    remote = [column for _, column in pairs]
    keys = [mapper.get_property_by_column(column) for column in remote]
    primary = [mapper.get_property_by_column(column) for column in mapper.primary_key]
    for some in chunks(identities):
        if len(keys) == len(primary) and set(keys) == set(primary):
            values = [tuple(identity[primary.index(key)] for key in keys) for identity in some]
            condition = among(local, values)
        else:
            inner = sa.select(*remote).select_from(mapper.persist_selectable).where(among(mapper.primary_key, some))
            condition = sa.tuple_(*local).in_(inner.correlate(None))
        query = sa.select(*part.primary_key).select_from(part.persist_selectable).where(condition)
        for row in connection_of(session, part).execute(query):
            yield tuple(row)


# -- the update of a root --------------------------------------------------------------------------------------------


def bump(session: orm.Session, rows: Iterable[Row]) -> set[Row]:
    """Update rows of base tables, one statement for each class; those that are there.

    An UPDATE locks, and conflicts under REPEATABLE READ, where a mere lock does not.
    """
    there: set[Row] = set()
    for mapper, identities in by_mapper(rows).items():
        table = base_table(mapper)
        primary = mapper.primary_key
        for some in chunks(identities):
            values = _bump_values(session, mapper, table, some)
            query = sa.update(table).where(among(primary, some)).values(values).returning(*primary)
            there |= {(mapper, tuple(row)) for row in connection_of(session, mapper).execute(query)}
    return there


def _bump_values(
    session: orm.Session, mapper: orm.Mapper[Any], table: sa.Table, identities: Sequence[Identity]
) -> dict[Any, Any]:
    column: Any = mapper.version_id_col
    generator = mapper.version_id_generator
    named = next((each.version for each in publications_at(mapper) if each.version is not None), None)
    if named is not None:
        attribute = mapper.column_attrs.get(named)
        column = None if attribute is None else attribute.columns[0]
        generator = None
        if column is None or getattr(column, "table", None) is not table or not isinstance(column.type, sa.Integer):
            raise ConfigError(
                f"{mapper.class_.__qualname__}.{named} is no whole number in the table {table.name}: version= cannot "
                "count it up.",
                cure="Name an Integer column of the root's own (base) table, or leave version= out.",
            )
    if column is not None and column.table is table and generator is not False:
        if isinstance(column.type, sa.Integer):
            return {column: column + 1}
        if callable(generator):
            # What it makes depends on what it was: the rows are locked, or the UPDATE finds another version.
            query = sa.select(*mapper.primary_key, column).where(among(mapper.primary_key, identities))
            cases = [
                (among(mapper.primary_key, [tuple(row[:-1])]), sa.literal(generator(row[-1]), column.type))
                for row in connection_of(session, mapper).execute(query)
            ]
            if cases:
                return {column: sa.case(*cases, else_=column)}
    # Without a version, or with one that the server counts, the row is written as it is: that locks it and conflicts
    # under REPEATABLE READ all the same.
    first = mapper.primary_key[0]
    return {first: first}
