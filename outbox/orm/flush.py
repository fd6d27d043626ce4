"""What happens in one flush, in this order (design section 3, "Currency").

1. Before it: the roots of the parts that it will change are looked up and bumped, in the order of their keys; then the
   rows of the parts are locked and looked at once more, since they may have moved meanwhile. The keys that published
   objects have in the database are read.
2. The unit of work writes. What it really wrote is collected: an object that is only marked dirty writes no row,
   locks nothing, and gets no entry. What only the unit of work finds out (an orphan, a part that it changes by itself)
   is looked up just before it is written.
3. After it: roots that only now are known are bumped, and so are the base rows of objects of which only a subclass's
   table was written; every object to be published is read again, in a later statement; then the state functions are
   called and the entries inserted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

from sqlalchemy import orm
from sqlalchemy.exc import DBAPIError

from outbox.errors import OutboxError, StateError
from outbox.orm import keys
from outbox.orm.publication import Publication, publication_of, role_of, ways_of
from outbox.orm.reading import as_it_is, read_again
from outbox.orm.roots import bump, climb, collections_of, new_parents, old_parents, parents
from outbox.orm.rows import (
    Identity,
    Row,
    changed_columns,
    connection_of,
    lock,
    state_of,
    top,
    will_write_base,
    writes_base,
)
from outbox.writer import NewEntry, put_many

State = orm.InstanceState[Any]


@dataclass(slots=True)
class _Flush:
    # Objects whose rows this flush inserts or updates; those of them of which it writes the row in the base table.
    written: dict[State, Any] = field(default_factory=dict)
    base_written: set[State] = field(default_factory=set)
    # Their rows as they were called before: a primary key may change.
    rows_before: dict[State, Row] = field(default_factory=dict)
    # Parts that it changes; those of them whose roots before the flush were read from the database.
    parts: dict[State, Any] = field(default_factory=dict)
    known: set[State] = field(default_factory=set)
    locked_parts: set[Row] = field(default_factory=set)
    # The keys that the rows of published objects had before; the objects whose rows cannot change any more.
    old_keys: dict[State, str] = field(default_factory=dict)
    held: set[State] = field(default_factory=set)
    # Published objects to be deleted; those of them whose rows were gone before.
    deleting: dict[State, Publication] = field(default_factory=dict)
    absent: set[State] = field(default_factory=set)
    # Rows of base tables to be updated; True: done, or the flush does it. Those that are there.
    roots: dict[Row, bool] = field(default_factory=dict)
    there: set[Row] = field(default_factory=set)


_flushes: WeakKeyDictionary[orm.Session, _Flush] = WeakKeyDictionary()

# What was changed behind the session's back inside savepoints, until the transaction ends.
_in_savepoints: WeakKeyDictionary[orm.SessionTransaction, set[Row]] = WeakKeyDictionary()


def _flush_of(target: object) -> tuple[orm.Session, _Flush] | None:
    session = orm.object_session(target)
    flush = None if session is None else _flushes.get(session)
    return None if session is None or flush is None else (session, flush)


def _row(state: State) -> Row:
    return state.mapper, tuple(cast("Identity", state.identity))


def _base_row(state: State) -> Row:
    return top(state.mapper), tuple(cast("Identity", state.identity))


# -- 1. before -------------------------------------------------------------------------------------------------------


def _before_flush(session: orm.Session, _context: object, _objects: object) -> None:
    flush = _flushes[session] = _Flush()
    deleted = session.deleted
    found: set[Row] = set()
    parts: set[Row] = set()
    changing: list[State] = []
    unchanged: list[State] = []
    for target in (*session.dirty, *deleted, *session.new):
        role = role_of(target.__class__)
        if role is None:
            continue
        state = state_of(target)
        for name in role.collections:
            touched = _touched(state, name)
            parts |= {_row(part) for part in touched if part.persistent}
            flush.known.update(part for part in touched if part.persistent)
            if touched and state.persistent and any(each.key == name for each in collections_of(state.mapper)):
                found.add(_row(state))
        if state.persistent:
            if target not in deleted and not session.is_modified(target, include_collections=False):
                # It writes no row, unless a listener still changes it: then its key is read once more, locked.
                unchanged += [state] if role.publication is not None else []
                continue
            if role.publication is not None:
                changing.append(state)
                if target in deleted:
                    flush.deleting[state] = role.publication
                elif not will_write_base(session, target):
                    flush.roots[_base_row(state)] = False
            if role.ways:
                parts.add(_row(state))
                flush.known.add(state)
        if role.ways:
            found |= new_parents(session, target)
    # A root that the flush itself updates is written by it, with the check of its version.
    _settle(
        session,
        flush,
        found,
        parts,
        changing,
        unless=lambda root: root in deleted or will_write_base(session, root),
    )
    flush.held.update(changing)
    _read_old_keys(session, flush, [*changing, *unchanged])


def _touched(state: State, name: str) -> list[State]:
    """The parts that come into a collection or leave it: the flush changes them, whether they know it or not."""
    if name not in state.dict and not state.modified:
        return []
    history = state.attrs[name].history
    return [state_of(part) for part in (*(history.added or ()), *(history.deleted or ())) if part is not None]


def _settle(
    session: orm.Session,
    flush: _Flush,
    found: set[Row],
    parts: set[Row],
    changing: Iterable[State],
    *,
    unless: Callable[[Any], bool],
) -> None:
    """Lock what the flush will write, from above: roots, then parts; again for a part that had moved meanwhile."""
    # Rows that must stay as they are until they are written: to be deleted, or with a key that is to be read.
    held = {
        _base_row(state)
        for state in changing
        if state in flush.deleting or not keys.plan(_published(state), state.mapper).by_identity
    }
    roots, on_the_way = climb(session, found | parents(session, parts))
    waiting = parts | on_the_way
    while True:
        new = roots - flush.roots.keys()
        flush.roots.update(dict.fromkeys(new, False))
        bumping = _to_bump(session, flush, unless)
        rows = held | new | bumping
        if len(rows) > 1 or held:
            flush.there |= lock(session, rows, deleting=bool(flush.deleting))
        _bump(session, flush, bumping)
        flush.absent |= {state for state in flush.deleting if _base_row(state) not in flush.there}
        waiting -= flush.locked_parts
        if not waiting:
            return
        flush.locked_parts |= waiting
        roots, on_the_way = climb(session, parents(session, waiting, lock=True), without=flush.locked_parts)
        waiting = on_the_way
        held = set()


def _to_bump(session: orm.Session, flush: _Flush, unless: Callable[[Any], bool]) -> set[Row]:
    rows: set[Row] = set()
    for (mapper, identity), done in flush.roots.items():
        if not done:
            root = session.identity_map.get(mapper.identity_key_from_primary_key(identity))
            if root is None or not unless(root):
                rows.add((mapper, identity))
    return rows


def _bump(session: orm.Session, flush: _Flush, rows: set[Row]) -> None:
    if not rows:
        return
    flush.there |= bump(session, rows)
    flush.roots.update(dict.fromkeys(rows, True))
    _remember(session, rows)


def _published(state: State) -> Publication:
    return cast("Publication", publication_of(state.mapper.class_))


def _read_old_keys(session: orm.Session, flush: _Flush, states: Iterable[State]) -> None:
    some = [(state, _published(state)) for state in states if state not in flush.absent]
    flush.old_keys.update(keys.old_keys(session, some))


# -- 2. while it writes ----------------------------------------------------------------------------------------------


def _before_insert(_mapper: object, _connection: object, target: object) -> None:
    found = _flush_of(target)
    if found is None:
        return
    _, flush = found
    state = state_of(target)
    publication = publication_of(target.__class__)
    if publication is not None:
        # A key that cannot be evaluated is refused with the first object, not with its first change.
        keys.plan(publication, state.mapper)
        flush.written[state] = target
        flush.base_written.add(state)
    if ways_of(target.__class__):
        flush.parts[state] = target
        flush.known.add(state)


def _before_update(_mapper: object, _connection: object, target: object) -> None:
    # Before, since a value that is a SQL expression is forgotten afterwards. The event comes for clean objects, too:
    # a listener that runs after this one may still change them.
    found = _flush_of(target)
    if found is None:
        return
    session, flush = found
    state = state_of(target)
    writes = changed_columns(target)
    publication = publication_of(target.__class__)
    if publication is not None and state not in flush.held and (writes or state not in flush.old_keys):
        if writes:
            flush.held.add(state)
            if not keys.plan(publication, state.mapper).by_identity:
                lock(session, [_base_row(state)], deleting=False)
        _read_old_keys(session, flush, [state])
    if writes:
        _wrote(session, flush, target)


def _before_delete(_mapper: object, _connection: object, target: object) -> None:
    # An orphan, and what it cascades to: only the flush finds out that it is to be deleted.
    found = _flush_of(target)
    if found is None:
        return
    session, flush = found
    state = state_of(target)
    if state.identity is None:
        return
    publication = publication_of(target.__class__)
    if publication is not None and state not in flush.deleting:
        flush.deleting[state] = publication
        flush.held.add(state)
        row = _base_row(state)
        flush.there |= lock(session, [row], deleting=True)
        if row not in flush.there:
            # Its tombstone was written by whoever deleted it. Another one could come after the state of an entity that
            # is just being made again under the same key.
            flush.absent.add(state)
        _read_old_keys(session, flush, [state])
    if ways_of(target.__class__):
        _look_up(session, flush, state)
        flush.parts[state] = target


def _wrote(session: orm.Session, flush: _Flush, target: object) -> None:
    state = state_of(target)
    if publication_of(target.__class__) is not None:
        flush.written[state] = target
        flush.rows_before[state] = _base_row(state)
        if writes_base(target):
            flush.base_written.add(state)
    if ways_of(target.__class__):
        _look_up(session, flush, state)
        flush.parts[state] = target


def _look_up(session: orm.Session, flush: _Flush, state: State) -> None:
    """Find the roots of a part that is about to be written and was not foreseen."""
    if state in flush.known:
        return
    flush.known.add(state)
    row = _row(state)
    flush.locked_parts.add(row)
    roots, _ = climb(session, parents(session, [row], lock=True))
    for root in roots:
        flush.roots.setdefault(root, False)


def _after_flush(session: orm.Session, _context: object) -> None:
    flush = _flushes.get(session)
    if flush is None:
        return
    late: list[Any] = []
    for target in session.dirty:
        # What other listeners changed after ours, and post_update.
        role = role_of(target.__class__)
        if role is not None and role.is_ours and changed_columns(target):
            state = state_of(target)
            if role.publication is not None:
                flush.written[state] = target
                if writes_base(target):
                    flush.base_written.add(state)
            if role.ways:
                flush.parts[state] = target
                if state not in flush.known:
                    late.append(target)
    for target in late:
        # Its row is written already: where it was before, the session alone can tell.
        roots, _ = climb(session, old_parents(session, target))
        for root in roots:
            flush.roots.setdefault(root, False)
    for state in flush.written:
        if state not in flush.base_written and state.identity is not None:
            flush.roots.setdefault(_base_row(state), False)


# -- 3. after --------------------------------------------------------------------------------------------------------


def _after_flush_postexec(session: orm.Session, _context: object) -> None:
    flush = _flushes.pop(session, None)
    if flush is None or not (flush.written or flush.deleting or flush.roots or flush.parts):
        return
    live = {_row(state) for state in flush.parts if state.persistent and state.identity is not None}
    roots, _ = climb(session, parents(session, live))
    for root in roots:
        flush.roots.setdefault(root, False)
    bumping = _to_bump(session, flush, lambda root: state_of(root) in flush.base_written)
    if len(bumping) > 1:
        lock(session, bumping, deleting=False)
    _bump(session, flush, bumping)
    with as_it_is(session):
        _publish(session, flush)


def _publish(session: orm.Session, flush: _Flush) -> None:
    gone = {_base_row(state) for state in flush.deleting}
    gone |= {row for state, row in flush.rows_before.items() if state.identity is None or _base_row(state) != row}
    roots = [row for row in flush.roots if row not in gone]
    targets, parts = read_again(session, flush.written, roots, flush.there)
    _remember(session, parts)
    before = _pending(session)
    entries: dict[Publication, dict[str, NewEntry]] = defaultdict(dict)
    mappers: dict[Publication, orm.Mapper[Any]] = {}
    for state, publication in flush.deleting.items():
        # Deleted, or replaced by a new object under the same identity.
        key = flush.old_keys.get(state)
        if key is not None and not state.persistent:
            entries[publication][key] = NewEntry.tombstone(key)
            mappers[publication] = state.mapper
    made: dict[tuple[Publication, str], NewEntry] = {}
    for target in targets:
        published_as = publication_of(target.__class__)
        if published_as is None:
            continue
        mappers[published_as] = state_of(target).mapper
        entry = _call(published_as, target)
        key = cast("str", entry.key)
        old = flush.old_keys.get(state_of(target))
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
        connection = connection_of(session, mappers[publication])
        put_many(connection, publication.type, by_key.values(), schema=publication.schema)


def _call(publication: Publication, target: object) -> NewEntry:
    key = ""
    try:
        key = keys.key_now(publication, target)
        return NewEntry(key, publication.state(target))
    except (OutboxError, DBAPIError):
        # What retries a transaction must still know a deadlock.
        raise
    except Exception as error:
        raise StateError(
            f'The state function of {publication.type} "{key}" failed: {error.__class__.__name__}: {error}',
            cure="The flush is undone. Mend the function that was passed to outbox.published: it may use the object "
            'and its parts; what else it reaches must let itself be loaded (not lazy="raise").',
        ) from error


def _pending(session: orm.Session) -> tuple[int, int, int]:
    return len(session.new), len(session.dirty), len(session.deleted)


# -- savepoints ------------------------------------------------------------------------------------------------------


def _remember(session: orm.Session, rows: Iterable[Row]) -> None:
    """The session did not change these objects itself: it would keep them when a savepoint is rolled back."""
    transaction = session.get_transaction()
    if transaction is not None and session.in_nested_transaction():
        _in_savepoints.setdefault(transaction, set()).update(rows)


def _after_soft_rollback(session: orm.Session, _previous: object) -> None:
    transaction = session.get_transaction()
    # They stay remembered: the savepoint around may be rolled back next.
    for mapper, identity in _in_savepoints.get(transaction, ()) if transaction is not None else ():
        target = session.identity_map.get(mapper.identity_key_from_primary_key(identity))
        if target is not None and state_of(target).persistent:
            session.expire(target)


MAPPER_LISTENERS: Mapping[str, Callable[..., None]] = {
    "before_insert": _before_insert,
    "before_update": _before_update,
    "before_delete": _before_delete,
}

SESSION_LISTENERS: Mapping[str, Callable[..., None]] = {
    "before_flush": _before_flush,
    "after_flush": _after_flush,
    "after_flush_postexec": _after_flush_postexec,
    "after_soft_rollback": _after_soft_rollback,
}
