"""What is published is read again after the flush: the session remembers what may be old.

Only what entries need is read, and what the session had loaded of it is loaded again, so that nothing disappears from
an object that the service goes on using: columns, the relationships that lead to parts, and of a published object the
relationships that were loaded. Changes that somebody else's listener left pending stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event, orm

from outbox.errors import StateError
from outbox.orm.publication import ways_of
from outbox.orm.roots import collections_of, parts_below, way
from outbox.orm.rows import Identity, Row, among, chunks, state_of, top

_STATEMENT = "outbox_statement"
# How these load cannot be said in a query, or they hold nothing.
_NOT_LOADED_EAGERLY = ("dynamic", "write_only", "noload")


# -- without the session's criteria ------------------------------------------------------------------------------------


def remember_statement(execution: orm.ORMExecuteState) -> None:
    """Keep a statement as it was before the listeners of the service (this one is the first)."""
    if execution.is_select:
        execution.update_execution_options(**{_STATEMENT: execution.statement})


def _restore_statement(execution: orm.ORMExecuteState) -> None:
    statement = execution.local_execution_options.get(_STATEMENT)
    if statement is not None:
        execution.statement = statement


@contextmanager
def as_it_is(session: orm.Session) -> Iterator[None]:
    """Read what the tables hold, whatever a listener adds to every query (`with_loader_criteria`: tenant, deleted)."""
    # Last, since it is on the session itself and new.
    event.listen(session, "do_orm_execute", _restore_statement)
    try:
        yield
    finally:
        event.remove(session, "do_orm_execute", _restore_statement)


# -- the objects -----------------------------------------------------------------------------------------------------


def read_again(
    session: orm.Session, written: Iterable[orm.InstanceState[Any]], roots: Iterable[Row], there: set[Row]
) -> tuple[list[Any], set[Row]]:
    """The objects of some rows with what the database holds now, and the rows that were read with them (parts).

    `there`: the roots that are known to exist. Raises `StateError` for one that cannot be read all the same.
    """
    rows = _with_objects(session, written, roots)
    must = there | {(top(state.mapper), tuple(state.identity)) for state in written if state.identity is not None}
    # Strong references: what is reloaded must not vanish before it is used.
    kept: list[Any] = []
    parts = parts_below(session, rows)
    for mapper, identity in parts:
        part = session.identity_map.get(mapper.identity_key_from_primary_key(identity))
        if part is not None and (top(mapper), identity) not in rows:
            kept.append(part)
            _expire_part(session, part)
    groups: dict[tuple[orm.Mapper[Any], frozenset[str]], list[Identity]] = defaultdict(list)
    for (mapper, identity), known in rows.items():
        if known is None:
            groups[mapper, frozenset()].append(identity)
        else:
            groups[state_of(known).mapper, _expire_object(session, known)].append(identity)
    targets: dict[Row, Any] = {}
    for (mapper, names), identities in groups.items():
        options = [*_parts_options(mapper, ()), *_subclass_options(mapper)]
        for target in _load(session, mapper, identities, names, options):
            state = state_of(target)
            targets[top(state.mapper), tuple(cast("Identity", state.identity))] = target
    for row, known in rows.items():
        if row not in targets and row in must:
            raise _missing(row, known)
    _load_rest(session, kept)
    for part in kept:
        _forget_moved(session, part)
    return list(targets.values()), parts


def _with_objects(
    session: orm.Session, written: Iterable[orm.InstanceState[Any]], roots: Iterable[Row]
) -> dict[Row, Any]:
    """Each row once, with the object that the session has of it, or None."""
    rows: dict[Row, Any] = {}
    for state in written:
        if state.persistent and state.identity is not None:
            rows[top(state.mapper), tuple(state.identity)] = state.obj()
    for mapper, identity in roots:
        rows.setdefault((mapper, identity), session.identity_map.get(mapper.identity_key_from_primary_key(identity)))
    return rows


def _missing(row: Row, target: object | None) -> StateError:
    mapper, identity = row
    cls = mapper.class_ if target is None else target.__class__
    return StateError(
        f"{cls.__qualname__} {', '.join(map(str, identity))} was written by this flush, and cannot be read again: no "
        "entry can be made of it.",
        cure="Something hides the row from this session or transaction (a do_orm_execute listener that answers by "
        "itself, row-level security, a trigger that deletes it). Let it read what it may write.",
    )


def _load(
    session: orm.Session,
    mapper: orm.Mapper[Any],
    identities: list[Identity],
    names: Iterable[str],
    options: list[Any],
) -> Iterator[Any]:
    for name in names:
        attribute = mapper.attrs[name].class_attribute
        options.append(orm.selectinload(attribute) if name in mapper.relationships else orm.undefer(attribute))
    for some in chunks(identities):
        query = sa.select(mapper.class_).where(among(mapper.primary_key, some)).options(*options)
        yield from session.execute(query).unique().scalars()


def _load_rest(session: orm.Session, parts: Iterable[Any]) -> None:
    """Load parts that no collection of their root has loaded again."""
    groups: dict[tuple[orm.Mapper[Any], frozenset[str]], list[Identity]] = defaultdict(list)
    for part in parts:
        state = state_of(part)
        if state.expired_attributes and state.persistent:
            names = frozenset(
                name
                for name in state.expired_attributes
                if name in state.mapper.relationships or _is_deferred(state.mapper, name)
            )
            groups[state.mapper, names - set(ways_of(state.mapper.class_))].append(
                tuple(cast("Identity", state.identity))
            )
    for (mapper, names), identities in groups.items():
        for _ in _load(session, mapper, identities, names, []):
            pass


def _parts_options(mapper: orm.Mapper[Any], path: tuple[orm.Mapper[Any], ...], before: Any = None) -> list[Any]:
    options: list[Any] = []
    for relationship in collections_of(mapper):
        if relationship.lazy in _NOT_LOADED_EAGERLY:
            continue
        attribute = relationship.class_attribute
        option = orm.selectinload(attribute) if before is None else before.selectinload(attribute)
        options.append(option)
        if below := _below(relationship.mapper):
            options.append(option.selectin_polymorphic(below))
        # A tree of parts is loaded level by level when it is used.
        if relationship.mapper not in (*path, mapper):
            options += _parts_options(relationship.mapper, (*path, mapper), option)
    return options


def _subclass_options(mapper: orm.Mapper[Any]) -> list[Any]:
    below = _below(mapper)
    return [orm.selectin_polymorphic(mapper.class_, below)] if below else []


def _below(mapper: orm.Mapper[Any]) -> list[type[Any]]:
    """The subclasses that have tables of their own: a query of the class alone leaves those out."""
    if mapper.polymorphic_on is None:
        return []
    return [each.class_ for each in mapper.self_and_descendants if each is not mapper and not each.single]


# -- what is forgotten -----------------------------------------------------------------------------------------------


def _expire_object(session: orm.Session, target: object) -> frozenset[str]:
    """Forget the columns and the relationships that are loaded; what must be asked for to be loaded again."""
    state = state_of(target)
    mapper = state.mapper
    columns = _unchanged(state, (attribute.key for attribute in mapper.column_attrs))
    relationships = _unchanged(
        state, (each.key for each in mapper.relationships if each.lazy not in _NOT_LOADED_EAGERLY)
    )
    _expire(session, target, [*columns, *relationships])
    _forget_cached(state)
    parts = {relationship.key for relationship in collections_of(mapper)}
    deferred = {name for name in columns if _is_deferred(mapper, name)}
    return frozenset(deferred.union(relationships) - parts)


def _expire_part(session: orm.Session, part: Any) -> None:
    """Forget a part's columns and its own parts."""
    state = state_of(part)
    columns = _unchanged(state, (attribute.key for attribute in state.mapper.column_attrs))
    _expire(session, part, [*columns, *_unchanged(state, (each.key for each in collections_of(state.mapper)))])
    _forget_cached(state)


def _expire(session: orm.Session, target: object, names: list[str]) -> None:
    # An empty list would mean everything, pending changes too.
    if names:
        session.expire(target, names)


_cached: WeakKeyDictionary[type[Any], frozenset[str]] = WeakKeyDictionary()


def _forget_cached(state: orm.InstanceState[Any]) -> None:
    """What `cached_property` made of the columns before; SQLAlchemy does not know of it."""
    cls = state.mapper.class_
    names = _cached.get(cls)
    if names is None:
        members = (item for base in cls.__mro__ for item in vars(base).items())
        names = _cached[cls] = frozenset(name for name, member in members if isinstance(member, cached_property))
    for name in names & state.dict.keys():
        del state.dict[name]


def _forget_moved(session: orm.Session, part: Any) -> None:
    """Forget the parent that another session has replaced."""
    state = state_of(part)
    for name in _unchanged(state, ways_of(state.mapper.class_)):
        _, columns = way(state.mapper, name)
        parent = state.dict[name]
        now = [state.dict.get(key) for key in columns]
        if now != [None if parent is None else state_of(parent).dict.get(key) for key in columns.values()]:
            session.expire(part, [name])


def _unchanged(state: orm.InstanceState[Any], names: Iterable[str]) -> list[str]:
    loaded = [name for name in names if name in state.dict]
    if not state.modified:
        return loaded
    return [name for name in loaded if not state.attrs[name].history.has_changes()]


def _is_deferred(mapper: orm.Mapper[Any], name: str) -> bool:
    return name in mapper.column_attrs and mapper.column_attrs[name].deferred
