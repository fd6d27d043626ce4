"""What is declared: published classes, and the parts of aggregates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import orm

from outbox.errors import ConfigError
from outbox.key import Key, key_text


@dataclass(frozen=True, slots=True)
class Publication:
    """How a class is published; see `outbox.published`."""

    type: str
    key: str | tuple[str, ...] | Callable[[Any], Key]
    state: Callable[[Any], object]
    version: str | None
    schema: str

    def key_of(self, view: object) -> str:
        """The key's text, from a view of an object (`keys.View`)."""
        if callable(self.key):
            return key_text(self.type, self.key(view))
        if isinstance(self.key, str):
            return key_text(self.type, getattr(view, self.key))
        return key_text(self.type, tuple(getattr(view, name) for name in self.key))

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that the key is made of; none: a function."""
        if callable(self.key):
            return ()
        return (self.key,) if isinstance(self.key, str) else self.key


@dataclass(frozen=True, slots=True)
class Role:
    """What a mapped class has to do with entries."""

    publication: Publication | None
    # The many-to-one relationships that lead to the root.
    ways: tuple[str, ...]
    # The one-to-many relationships to parts (of this class or of another) through which a flush writes parts.
    collections: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Whether a change of an object is an entry."""
        return self.publication is not None or bool(self.ways)


publications: WeakKeyDictionary[type[Any], Publication] = WeakKeyDictionary()
parts: WeakKeyDictionary[type[Any], tuple[str, ...]] = WeakKeyDictionary()
# What is found out from the declarations and the mappers, until something else is declared.
_derived: list[WeakKeyDictionary[Any, Any]] = []


def derived() -> WeakKeyDictionary[Any, Any]:
    """A dictionary that is emptied by each declaration."""
    _derived.append(WeakKeyDictionary())
    return _derived[-1]


_roles: WeakKeyDictionary[type[Any], Role | None] = derived()


def add_publication(cls: type[Any], publication: Publication) -> None:
    """Remember a published class; raises `ConfigError` when it is published already."""
    if cls in publications:
        raise ConfigError(f"{cls.__qualname__} is published already, as {publications[cls].type}.")
    publications[cls] = publication
    _forget()


def add_part(cls: type[Any], relationships: tuple[str, ...]) -> None:
    """Remember a part."""
    parts[cls] = relationships
    _forget()


def _forget() -> None:
    for dictionary in _derived:
        dictionary.clear()


def publication_of(cls: type[Any]) -> Publication | None:
    """How a class is published, by itself or through a base."""
    return next((publications[base] for base in cls.__mro__ if base in publications), None)


def ways_of(cls: type[Any]) -> tuple[str, ...]:
    """The names of the relationships to the root."""
    return next((parts[base] for base in cls.__mro__ if base in parts), ())


def publications_at(mapper: orm.Mapper[Any]) -> list[Publication]:
    """The publications of a class and of its subclasses: a relationship to the base may lead to either."""
    found = (publication_of(each.class_) for each in mapper.self_and_descendants)
    return [publication for publication in found if publication is not None]


def role_of(cls: type[Any]) -> Role | None:
    """What a class has to do with entries; None: nothing."""
    try:
        return _roles[cls]
    except KeyError:
        pass
    mapper: orm.Mapper[Any] = sa.inspect(cls)
    collections = tuple(
        relationship.key
        for relationship in mapper.relationships
        if relationship.direction is orm.ONETOMANY
        and not relationship.viewonly
        and any(ways_of(each.class_) for each in relationship.mapper.self_and_descendants)
    )
    role: Role | None = Role(publication_of(cls), ways_of(cls), collections)
    if role is not None and not role.is_ours and not role.collections:
        role = None
    _roles[cls] = role
    return role


def part_mappers() -> Iterator[orm.Mapper[Any]]:
    """The mappers of the declared parts; of what is no mapped class itself (a mixin) those of its subclasses."""
    waiting: list[type[Any]] = list(parts)
    seen: set[type[Any]] = set()
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        mapper: orm.Mapper[Any] | None = sa.inspect(cls, raiseerr=False)
        if mapper is not None:
            yield mapper
        else:
            waiting += _subclasses(cls)


def _subclasses(cls: type[Any]) -> Iterable[type[Any]]:
    return type.__subclasses__(cls)
