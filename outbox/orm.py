"""Automatic entries: every flush that really writes a published object writes its entry.

What a flush does, in this order (design section 3, "Currency"):

1. Before it: the rows of changed children are locked and their roots read from the database, since what the session
   remembers may be old; then the roots are bumped, in the order of their keys. An UPDATE locks, and conflicts under
   REPEATABLE READ, where a mere lock does not.
2. The unit of work writes. What it really wrote is collected: an object that is only marked dirty writes no row,
   locks nothing, and gets no entry.
3. After it: roots that only now are known are bumped; every object to be published is read again, in a later
   statement; then the state functions are called and the entries inserted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, overload
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.exc import SQLAlchemyError

from outbox.errors import BypassError, ConfigError, OutboxError, StateError
from outbox.key import Key, key_text
from outbox.writer import NewEntry, put_many

C = TypeVar("C", bound=type[Any])

_READ_AT_ONCE = 1000
BYPASS = "outbox_bypass"


@dataclass(frozen=True, slots=True)
class Publication:
    """How a class is published; see `published`."""

    type: str
    key: str | tuple[str, ...] | Callable[[Any], Key]
    state: Callable[[Any], object]
    version: str | None
    schema: str

    def key_of(self, view: object) -> str:
        """The key's text, from an object or from a view of what it was."""
        if callable(self.key):
            return key_text(self.type, self.key(view))
        if isinstance(self.key, str):
            return key_text(self.type, getattr(view, self.key))
        return key_text(self.type, tuple(getattr(view, name) for name in self.key))


_publications: WeakKeyDictionary[type[Any], Publication] = WeakKeyDictionary()
_parts: WeakKeyDictionary[type[Any], tuple[str, ...]] = WeakKeyDictionary()


@overload
def published(
    cls: C,
    /,
    *,
    type: str,
    key: str | tuple[str, ...] | Callable[[Any], Key],
    state: Callable[[Any], object],
    version: str | None = None,
    schema: str = "outbox",
) -> C: ...
@overload
def published(
    cls: None = None,
    /,
    *,
    type: str,
    key: str | tuple[str, ...] | Callable[[Any], Key],
    state: Callable[[Any], object],
    version: str | None = None,
    schema: str = "outbox",
) -> Callable[[C], C]: ...
def published(
    cls: C | None = None,
    /,
    *,
    type: str,
    key: str | tuple[str, ...] | Callable[[Any], Key],
    state: Callable[[Any], object],
    version: str | None = None,
    schema: str = "outbox",
) -> C | Callable[[C], C]:
    """Declare a mapped class published: a decorator, or a call with the class. Subclasses are published, too.

    - `type`: the entity type. `key`: the name of an attribute, a tuple of names, or a function of the object.
    - `state`: a function of the object that returns its state (what `outbox.put` takes). It sees the object as read
      from the database after the flush, and its parts (`part_of`); what else it reaches may be old. It must not
      change the session.
    - `version`: for the root of an aggregate, the name of a whole-number attribute that each change of a part
      increases. Left out: the mapper's `version_id_col`; without one the row is updated without a change.

    A deleted object gets a tombstone; a change of the key gives one for the old key and the state for the new.
    Raises `ConfigError` when the class itself is published already.
    """

    def declare(target: C) -> C:
        if target in _publications:
            raise ConfigError(f"{target.__qualname__} is published already, as {_publications[target].type}.")
        _publications[target] = Publication(type, key, state, version, schema)
        _listen(target)
        return target

    return declare if cls is None else declare(cls)


def part_of(*relationships: str) -> Callable[[C], C]:
    """Declare a mapped class a part of an aggregate: a change of it updates and publishes its root.

    `relationships`: the names of the many-to-one relationships that lead to the root, or to another part. Roots are
    found through the foreign key: of the row as it is in the database, and of what the flush writes.
    """

    def declare(target: C) -> C:
        _parts[target] = relationships
        _listen(target)
        return target

    return declare


def _publication(cls: type[Any]) -> Publication | None:
    return next((_publications[base] for base in cls.__mro__ if base in _publications), None)


def _relationships(cls: type[Any]) -> tuple[str, ...]:
    return next((_parts[base] for base in cls.__mro__ if base in _parts), ())


def _listen(target: type[Any]) -> None:
    for name, listener in (
        ("before_insert", _before_insert),
        ("before_update", _before_update),
        ("before_delete", _before_delete),
        ("after_delete", _after_delete),
    ):
        event.listen(target, name, listener, propagate=True)
    for name, session_listener in _SESSION_LISTENERS.items():
        # On the base class: it holds for every session, once, whatever classes and makers of sessions there are.
        if not event.contains(orm.Session, name, session_listener):
            event.listen(orm.Session, name, session_listener)


# -- one flush -----------------------------------------------------------------------------------------------------

Identity = tuple[Any, ...]
Root = tuple[orm.Mapper[Any], Identity]


@dataclass(slots=True)
class _Flush:
    # Objects whose rows this flush inserts or updates; what is deleted is a key.
    written: dict[orm.InstanceState[Any], Any] = field(default_factory=dict)
    children: dict[orm.InstanceState[Any], Any] = field(default_factory=dict)
    # Children whose roots before the flush were read from the database.
    known: set[orm.InstanceState[Any]] = field(default_factory=set)
    gone: dict[tuple[Publication, str], orm.Mapper[Any]] = field(default_factory=dict)
    old_keys: dict[orm.InstanceState[Any], str] = field(default_factory=dict)
    # Deleted objects whose rows are locked, and those whose rows were gone before.
    locked: set[orm.InstanceState[Any]] = field(default_factory=set)
    absent: set[orm.InstanceState[Any]] = field(default_factory=set)
    # True: bumped.
    roots: dict[Root, bool] = field(default_factory=dict)


_flushes: WeakKeyDictionary[orm.Session, _Flush] = WeakKeyDictionary()
_bumped: WeakKeyDictionary[orm.Session, WeakSet[Any]] = WeakKeyDictionary()


def _flush_of(target: object) -> _Flush | None:
    session = orm.object_session(target)
    return None if session is None else _flushes.get(session)


def _before_insert(_mapper: object, _connection: object, target: object) -> None:
    flush = _flush_of(target)
    if flush is not None:
        _wrote(flush, target)


def _before_update(_mapper: object, _connection: object, target: object) -> None:
    # Before, since a value that is a SQL expression is forgotten afterwards. The event comes for clean objects, too.
    flush = _flush_of(target)
    if flush is not None and _changed_columns(target):
        _wrote(flush, target)


def _before_delete(_mapper: object, _connection: object, target: object) -> None:
    # An orphan: only the flush finds out that it is to be deleted.
    flush = _flush_of(target)
    session = orm.object_session(target)
    if flush is not None and session is not None:
        _lock_deleted(session, flush, [target])


def _lock_deleted(session: orm.Session, flush: _Flush, targets: Iterable[object]) -> None:
    """Find out which rows are there to be deleted.

    A row that is gone has got its tombstone from whoever deleted it. Another one could come after the state of an
    entity that is just being made again under the same key.
    """
    by_mapper: dict[orm.Mapper[Any], dict[Identity, orm.InstanceState[Any]]] = defaultdict(dict)
    for target in targets:
        state = _state(target)
        if _publication(target.__class__) is not None and state not in flush.locked and state.identity is not None:
            by_mapper[state.mapper][tuple(state.identity)] = state
    for mapper, states in by_mapper.items():
        there = {tuple(row) for row in _select(session, mapper, mapper.primary_key, list(states))}
        flush.locked.update(states.values())
        flush.absent.update(state for identity, state in states.items() if identity not in there)


def _after_delete(_mapper: object, _connection: object, target: object) -> None:
    flush = _flush_of(target)
    if flush is None:
        return
    state = _state(target)
    flush.written.pop(state, None)
    publication = _publication(target.__class__)
    if publication is not None and state not in flush.absent:
        key = flush.old_keys.get(state) or publication.key_of(_Before(target))
        flush.gone[publication, key] = state.mapper
    if _relationships(target.__class__):
        flush.children[state] = target


def _wrote(flush: _Flush, target: object) -> None:
    if _publication(target.__class__) is not None:
        flush.written[_state(target)] = target
    if _relationships(target.__class__):
        flush.children[_state(target)] = target


def _before_flush(session: orm.Session, _context: object, _objects: object) -> None:
    flush = _flushes[session] = _Flush()
    persistent: dict[orm.Mapper[Any], list[Identity]] = defaultdict(list)
    found: set[Root] = set()
    deleted = set(session.deleted)
    _lock_deleted(session, flush, deleted)
    for target in (*session.dirty, *deleted):
        publication = _publication(target.__class__)
        relationships = _relationships(target.__class__)
        if publication is None and not relationships:
            continue
        if target not in deleted and not session.is_modified(target, include_collections=False):
            continue
        state = _state(target)
        if publication is not None and _key_may_change(publication, target, is_deleted=target in deleted):
            flush.old_keys[state] = publication.key_of(_in_database(session, target))
        if relationships:
            persistent[state.mapper].append(cast("Identity", state.identity))
            flush.known.add(state)
            found |= _new_parents(session, target)
    for target in session.new:
        if _relationships(target.__class__):
            found |= _new_parents(session, target)
    for mapper, identities in persistent.items():
        found |= _parents(session, mapper, identities)
    flush.roots = dict.fromkeys(_climb(session, found), False)
    # A root that the flush itself updates is written by it, with the check of its version.
    _bump(session, flush, unless=lambda root: root in deleted or session.is_modified(root, include_collections=False))


def _after_flush(session: orm.Session, _context: object) -> None:
    flush = _flushes.get(session)
    if flush is None:
        return
    for target in session.dirty:
        # What other listeners changed after ours, and post_update.
        if _state(target) not in flush.written and _is_ours(target.__class__) and _changed_columns(target):
            _wrote(flush, target)
    # Roots of children that were not seen before the flush (orphans of a collection without a way back).
    found: set[Root] = set()
    for state, target in flush.children.items():
        if state in flush.known:
            continue
        for relationship in _relationships(target.__class__):
            target_mapper, columns = _foreign_key(state.mapper, relationship)
            before = _Before(target)
            found |= _identified(session, target_mapper, columns, [tuple(getattr(before, key) for key in columns)])
    for root in _climb(session, found):
        flush.roots.setdefault(root, False)


def _after_flush_postexec(session: orm.Session, _context: object) -> None:
    flush = _flushes.pop(session, None)
    if flush is None or not (flush.written or flush.gone or flush.roots or flush.children):
        return
    live: dict[orm.Mapper[Any], list[Identity]] = defaultdict(list)
    for state in flush.children:
        if state.identity is not None and not state.deleted and not state.was_deleted:
            live[state.mapper].append(state.identity)
    found: set[Root] = set()
    for mapper, identities in live.items():
        found |= _parents(session, mapper, identities)
    for root in _climb(session, found):
        flush.roots.setdefault(root, False)
    _bump(session, flush, unless=lambda root: _state(root) in flush.written)
    _publish(session, flush)


def _publish(session: orm.Session, flush: _Flush) -> None:
    targets = _read_again(session, flush)
    before = _pending(session)
    entries: dict[Publication, dict[str, NewEntry]] = defaultdict(dict)
    mappers: dict[Publication, orm.Mapper[Any]] = {}
    for (publication, key), mapper in flush.gone.items():
        entries[publication][key] = NewEntry.tombstone(key)
        mappers[publication] = mapper
    made: dict[tuple[Publication, str], NewEntry] = {}
    for target in targets:
        published_as = _publication(target.__class__)
        if published_as is None:
            continue
        mappers[published_as] = _state(target).mapper
        entry = _call(published_as, target)
        key = cast("str", entry.key)
        old = flush.old_keys.get(_state(target))
        if old is not None and old != key:
            entries[published_as].setdefault(old, NewEntry.tombstone(old))
        made[published_as, key] = entry
        if _pending(session) != before:
            raise StateError(
                f'The state function of {published_as.type} "{key}" changed the session.',
                cure="It may only read: what it changes would be written after the state was taken.",
            )
    # A live object goes before a tombstone of the same key (deleted and made again, or two that swapped keys).
    for (publication, key), entry in made.items():
        entries[publication][key] = entry
    for publication, by_key in entries.items():
        connection = _connection(session, mappers[publication])
        put_many(connection, publication.type, by_key.values(), schema=publication.schema)


def _call(publication: Publication, target: object) -> NewEntry:
    key = ""
    try:
        key = publication.key_of(target)
        return NewEntry(key, publication.state(target))
    except (OutboxError, SQLAlchemyError):
        raise
    except Exception as error:
        raise StateError(
            f'The state function of {publication.type} "{key}" failed: {error.__class__.__name__}: {error}',
            cure="The flush is undone; mend the function that was passed to outbox.published.",
        ) from error


def _read_again(session: orm.Session, flush: _Flush) -> list[Any]:
    """Every object to be published, with what the database holds now; its parts are read when they are used."""
    if _parts:
        instances = list(session.identity_map.values())
        parts = {cls for cls in {instance.__class__ for instance in instances} if _relationships(cls)}
        for instance in instances:
            # A part keeps its old values when a query meets it again, unless they are expired.
            if instance.__class__ in parts and not _state(instance).modified:
                session.expire(instance)
    wanted: dict[orm.Mapper[Any], dict[Identity, None]] = defaultdict(dict)
    targets: dict[orm.InstanceState[Any], Any] = {}
    for state, target in flush.written.items():
        if state.persistent:
            targets[state] = target
            session.expire(target)
            wanted[state.mapper][cast("Identity", state.identity)] = None
    for mapper, identity in flush.roots:
        root = session.identity_map.get(mapper.identity_key_from_primary_key(identity))
        if root is not None:
            session.expire(root)
        wanted[mapper][identity] = None
    for mapper, identities in wanted.items():
        for some in _chunks(list(identities)):
            query = sa.select(mapper.class_).where(_among(mapper.primary_key, some))
            rows = session.execute(query, execution_options={"populate_existing": True}).unique().scalars()
            for target in rows:
                targets.setdefault(_state(target), target)
    bumped = _bumped.setdefault(session, WeakSet())
    bumped.update(target for target in targets.values() if _state(target) not in flush.written)
    return list(targets.values())


def _after_soft_rollback(session: orm.Session, _previous: object) -> None:
    # A root that was bumped inside a savepoint was not changed by the session: it does not forget it by itself.
    for root in _bumped.pop(session, ()):
        if _state(root).persistent and root in session:
            session.expire(root)


def _pending(session: orm.Session) -> tuple[int, int, int]:
    return len(session.new), len(session.dirty), len(session.deleted)


# -- bulk statements -------------------------------------------------------------------------------------------------


def _do_orm_execute(execution: orm.ORMExecuteState) -> None:
    if not (execution.is_update or execution.is_delete or execution.is_insert):
        return
    if execution.execution_options.get(BYPASS) or execution.is_select:
        return
    mapper = execution.bind_mapper
    if mapper is not None:
        cls = next((m.class_ for m in mapper.self_and_descendants if _is_ours(m.class_)), None)
    else:
        table = getattr(execution.statement, "table", None)
        cls = next((cls for cls in (*_publications, *_parts) if table in _tables(cls)), None)
    if cls is not None:
        raise BypassError(
            f"A bulk statement on {cls.__qualname__} goes around the unit of work: no entry would be written.",
            cure="Change the objects and flush; or pass execution_options(outbox_bypass=True) and write the entries "
            "with outbox.put_many in the same transaction, from states read after the statement.",
        )


def _tables(cls: type[Any]) -> Iterable[object]:
    mapper = sa.inspect(cls, raiseerr=False)
    return () if mapper is None else mapper.tables


# -- keys ----------------------------------------------------------------------------------------------------------


class _Before:
    """An object as it was before the flush, as far as the session knows."""

    def __init__(self, target: object, values: Mapping[str, object] | None = None) -> None:
        self._target = target
        self._values = values
        self.unknown = False  # whether a value was asked for that the session has replaced without having read it

    def __getattr__(self, name: str) -> object:
        state = _state(self._target)
        if self._values is not None and name in self._values:
            return self._values[name]
        if name in state.mapper.column_attrs:
            primary = [state.mapper.get_property_by_column(column).key for column in state.mapper.primary_key]
            if name in primary and state.identity is not None:
                return state.identity[primary.index(name)]
            history = state.attrs[name].history
            if history.deleted:
                return history.deleted[0]
            self.unknown |= history.has_changes()
        member = getattr(self._target.__class__, name, None)
        if isinstance(member, property) and member.fget is not None:
            return member.fget(self)
        return getattr(self._target, name)


def _key_may_change(publication: Publication, target: object, *, is_deleted: bool) -> bool:
    mapper = _state(target).mapper
    primary = {mapper.get_property_by_column(column).key for column in mapper.primary_key}
    if callable(publication.key):
        before = _Before(target)
        return is_deleted or _key_or_none(publication, before) != _key_or_none(publication, target) or before.unknown
    names = {publication.key} if isinstance(publication.key, str) else set(publication.key)
    if is_deleted:
        return not names <= primary
    # A relationship may set one of them in the flush: then it has a history, and nothing is lost by looking.
    return any(
        name not in mapper.column_attrs or _state(target).attrs[name].history.has_changes() for name in names
    ) or (
        any(
            relationship.direction is orm.MANYTOONE
            and _state(target).attrs[relationship.key].history.has_changes()
            and names & {mapper.get_property_by_column(column).key for column in relationship.local_columns}
            for relationship in mapper.relationships
        )
    )


def _key_or_none(publication: Publication, target: object) -> str | None:
    try:
        return publication.key_of(target)
    except OutboxError:
        return None


def _in_database(session: orm.Session, target: object) -> _Before:
    """The object as its row is now, locked: another session may have changed the key since it was loaded."""
    state = _state(target)
    names = [attribute.key for attribute in state.mapper.column_attrs if isinstance(attribute.columns[0], sa.Column)]
    columns = [state.mapper.column_attrs[name].columns[0] for name in names]
    rows = _select(session, state.mapper, columns, [cast("Identity", state.identity)])
    return _Before(target, dict(zip(names, rows[0], strict=True)) if rows else None)


# -- roots ---------------------------------------------------------------------------------------------------------


def _foreign_key(mapper: orm.Mapper[Any], name: str) -> tuple[orm.Mapper[Any], dict[str, str]]:
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


def _new_parents(session: orm.Session, target: object) -> set[Root]:
    """Where a child leads to as the session has it: through the object, or the value of the foreign key alone."""
    state = _state(target)
    found: set[Root] = set()
    for name in _relationships(target.__class__):
        target_mapper, columns = _foreign_key(state.mapper, name)
        if state.persistent and not any(state.attrs[key].history.has_changes() for key in (name, *columns)):
            # What is not changed may be old; the row tells.
            continue
        parent = state.dict.get(name)
        if parent is not None:
            parent_state = _state(parent)
            if parent_state.identity is not None:
                found.add((parent_state.mapper, tuple(parent_state.identity)))
        values = tuple(state.dict.get(key) for key in columns)
        found |= _identified(session, target_mapper, columns, [values])
    return found


def _parents(session: orm.Session, mapper: orm.Mapper[Any], identities: Sequence[Identity]) -> set[Root]:
    """Where children lead to as their rows are now; the rows are locked, so that they cannot move meanwhile."""
    found: set[Root] = set()
    for name in _relationships(mapper.class_):
        target_mapper, columns = _foreign_key(mapper, name)
        rows = _select(session, mapper, [mapper.column_attrs[key].columns[0] for key in columns], identities)
        found |= _identified(session, target_mapper, columns, rows)
    return found


def _identified(
    session: orm.Session, mapper: orm.Mapper[Any], columns: Mapping[str, str], values: Iterable[Sequence[Any]]
) -> set[Root]:
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
    query = query.where(_among([mapper.column_attrs[key].columns[0] for key in remote], known))
    return {(mapper, tuple(row)) for row in _connection(session, mapper).execute(query)}


def _publications_at(mapper: orm.Mapper[Any]) -> list[Publication]:
    """The publications of a class and of its subclasses: a relationship to the base may lead to either."""
    found = (_publication(each.class_) for each in mapper.self_and_descendants)
    return [publication for publication in found if publication is not None]


def _climb(session: orm.Session, found: Iterable[Root]) -> set[Root]:
    """From parts of parts up to what is published."""
    roots: set[Root] = set()
    seen: set[Root] = set()
    waiting = set(found)
    while waiting:
        seen |= waiting
        above: set[Root] = set()
        by_mapper: dict[orm.Mapper[Any], list[Identity]] = defaultdict(list)
        for mapper, identity in waiting:
            if _publications_at(mapper):
                roots.add((mapper.base_mapper, identity))
            if _relationships(mapper.class_):
                by_mapper[mapper].append(identity)
        for mapper, identities in by_mapper.items():
            above |= _parents(session, mapper, identities)
        waiting = above - seen
    return roots


def _bump(session: orm.Session, flush: _Flush, *, unless: Callable[[Any], bool]) -> None:
    """Update the roots that nothing has updated yet, always in the same order, so that two flushes cannot deadlock."""
    for mapper, identity in sorted(
        (root for root, done in flush.roots.items() if not done),
        key=lambda root: (root[0].class_.__name__, str(root[1])),
    ):
        root = session.identity_map.get(mapper.identity_key_from_primary_key(identity))
        if root is not None and unless(root):
            continue
        table = cast("sa.Table", mapper.primary_key[0].table)
        query = sa.update(table).where(
            *(column == value for column, value in zip(mapper.primary_key, identity, strict=True))
        )
        _connection(session, mapper).execute(query.values(_bump_values(mapper, table)))
        flush.roots[mapper, identity] = True


def _bump_values(mapper: orm.Mapper[Any], table: sa.Table) -> dict[sa.Column[Any], Any]:
    column: Any = mapper.version_id_col
    versions = [each.version for each in _publications_at(mapper) if each.version is not None]
    named = next((name for name in versions if name in mapper.column_attrs), None)
    if named is not None:
        column = mapper.column_attrs[named].columns[0]
    if column is not None and column.table is table:
        if isinstance(column.type, sa.Integer):
            return {column: column + 1}
        generator = mapper.version_id_generator
        if callable(generator):
            return {column: generator(None)}
    # Without a version the row is written as it is: that locks it and conflicts under REPEATABLE READ all the same.
    first = cast("sa.Column[Any]", mapper.primary_key[0])
    return {first: first}


# -- small helpers ---------------------------------------------------------------------------------------------------


def _is_ours(cls: type[Any]) -> bool:
    return _publication(cls) is not None or bool(_relationships(cls))


def _state(target: object) -> orm.InstanceState[Any]:
    return cast("orm.InstanceState[Any]", sa.inspect(target))


def _changed_columns(target: object) -> bool:
    state = _state(target)
    return any(state.attrs[attribute.key].history.has_changes() for attribute in state.mapper.column_attrs)


def _connection(session: orm.Session, mapper: orm.Mapper[Any]) -> sa.Connection:
    return session.connection(bind_arguments={"mapper": mapper})


def _chunks(identities: Sequence[Identity]) -> Iterable[Sequence[Identity]]:
    return (identities[start : start + _READ_AT_ONCE] for start in range(0, len(identities), _READ_AT_ONCE))


def _among(columns: Sequence[Any], values: Sequence[Identity]) -> sa.ColumnElement[bool]:
    if len(columns) == 1:
        return cast("sa.ColumnElement[bool]", columns[0].in_([value[0] for value in values]))
    return sa.tuple_(*columns).in_(values)


def _select(
    session: orm.Session, mapper: orm.Mapper[Any], columns: Sequence[Any], identities: Sequence[Identity]
) -> list[sa.Row[Any]]:
    rows: list[sa.Row[Any]] = []
    for some in _chunks(identities):
        query = sa.select(*columns).select_from(mapper.persist_selectable).where(_among(mapper.primary_key, some))
        rows += _connection(session, mapper).execute(query.order_by(*mapper.primary_key).with_for_update()).all()
    return rows


_SESSION_LISTENERS: Mapping[str, Callable[..., None]] = {
    "before_flush": _before_flush,
    "after_flush": _after_flush,
    "after_flush_postexec": _after_flush_postexec,
    "after_soft_rollback": _after_soft_rollback,
    "do_orm_execute": _do_orm_execute,
}
