"""Automatic entries: every flush that really writes a published object writes its entry.

The rooms, from below: `publication` (what is declared), `rows` (rows of tables, read and locked), `keys` (the key of
an object as it is and as it was), `roots` (from parts to roots), `reading` (objects as the database holds them after
the flush), `flush` (what happens in one flush, in which order), `bypass` (bulk statements).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from sqlalchemy import event, orm

from outbox.errors import ConfigError
from outbox.key import Key
from outbox.orm import bypass, flush, reading
from outbox.orm.publication import Publication, add_part, add_publication

__all__ = ["part_of", "published"]

C = TypeVar("C", bound=type[Any])


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

    - `type`: the entity type. `key`: the name of an attribute, a tuple of names, or a function of the object. It is
      computed from the row's columns, as they are and as they were: an attribute may be a column, a synonym, a
      property, a cached or a hybrid property; a function may use all of these, and methods. A relationship or a
      `column_property` raises `ConfigError` at the first flush, and so does the name of a method.
    - `state`: a function of the object that returns its state (what `outbox.put` takes). It sees the columns of the
      object and of its parts (`part_of`) as read from the database after the flush; what else it reaches may be old.
      It must not change the session.
    - `version`: for the root of an aggregate, the name of a whole-number attribute that each change of a part
      increases. Left out: the mapper's `version_id_col`; without one the row is updated without a change.

    A deleted object gets a tombstone; a change of the key gives one for the old key and the state for the new.
    Raises `ConfigError` when the class itself is published already.
    """

    def declare(target: C) -> C:
        add_publication(target, Publication(type, key, state, version, schema))
        _listen(target)
        return target

    return declare if cls is None else declare(cls)


def part_of(*relationships: str) -> Callable[[C], C]:
    """Declare a mapped class a part of an aggregate: a change of it updates and publishes its root.

    `relationships`: the names of the many-to-one relationships that lead to the root, or to another part. Roots are
    found through the foreign key: of the row as it is in the database, and of what the flush writes.
    """
    if not relationships or not all(isinstance(name, str) for name in relationships):
        raise ConfigError(
            "outbox.part_of needs the name of a relationship.",
            cure='Name the one that leads to the root: @outbox.part_of("order").',
        )

    def declare(target: C) -> C:
        add_part(target, relationships)
        _listen(target)
        return target

    return declare


def _listen(target: type[Any]) -> None:
    for name, listener in flush.MAPPER_LISTENERS.items():
        event.listen(target, name, listener, propagate=True)
    # On the base class: it holds for every session, once, whatever classes and makers of sessions there are.
    for name, listener in {**flush.SESSION_LISTENERS, "do_orm_execute": bypass.do_orm_execute}.items():
        if not event.contains(orm.Session, name, listener):
            event.listen(orm.Session, name, listener)
    if not event.contains(orm.Session, "do_orm_execute", reading.remember_statement):
        event.listen(orm.Session, "do_orm_execute", reading.remember_statement, insert=True)
