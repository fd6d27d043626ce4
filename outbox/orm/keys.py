"""The key of an object, as it is and as it was.

Both are computed in the same way, on a view of the columns' values, so that what was published under a key and what
takes it back cannot differ: the object itself knows only what it is now.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.hybrid import hybrid_property

from outbox.errors import ConfigError, EntryKeyError
from outbox.orm.publication import Publication
from outbox.orm.rows import Identity, read, state_of

_CURE = (
    "A key is made of columns, since the old one must be known after a change: name a column, a synonym, a property or "
    "a hybrid property (for a relationship its foreign key), or pass a function of these."
)


class View:
    """An object of which only the columns are known; what is computed from columns can be computed from it.

    Methods, properties and hybrid properties run on the view. `ConfigError` for what is not made of columns.
    """

    def __init__(self, publication: Publication, mapper: orm.Mapper[Any], value: Callable[[str], object]) -> None:
        self.__publication = publication
        self.__mapper = mapper
        self.__value = value

    def __getattr__(self, name: str) -> object:
        mapper = self.__mapper
        if name in mapper.attrs:
            attribute = mapper.attrs[name]
            if isinstance(attribute, orm.SynonymProperty):
                return getattr(self, attribute.name)
            if isinstance(attribute, orm.CompositeProperty):
                make = cast("Callable[..., object]", attribute.composite_class)
                return make(*[getattr(self, each.key) for each in attribute.props])
            if isinstance(attribute, orm.ColumnProperty) and isinstance(attribute.columns[0], sa.Column):
                return self.__value(name)
            raise refusal(self.__publication, mapper, name)
        member = _member(mapper, name)
        if isinstance(member, property | hybrid_property) and member.fget is not None:
            return member.fget(self)
        if isinstance(member, cached_property):
            return member.func(self)
        if isinstance(member, staticmethod | classmethod):
            return getattr(mapper.class_, name)
        if inspect.isfunction(member):
            # Of the view, not of the object: it sees what the key is made of.
            return member.__get__(self)
        if member is None:
            raise AttributeError(
                f"{mapper.class_.__qualname__} has no attribute {name!r} that its key can be made of: it is no column, "
                "and nothing that the class computes from columns"
            )
        if callable(member) or hasattr(member, "__get__"):
            raise refusal(self.__publication, mapper, name)
        return member


def _member(mapper: orm.Mapper[Any], name: str) -> Any:
    return inspect.getattr_static(mapper.class_, name, None)


def refusal(publication: Publication, mapper: orm.Mapper[Any], name: str) -> ConfigError:
    """What is raised for an attribute that cannot be evaluated on what an object was."""
    member = _member(mapper, name)
    if name in mapper.relationships:
        kind = "a relationship"
    elif name in mapper.attrs:
        kind = "computed by the database in each query"
    elif member is None:
        kind = "no attribute of the class"
    else:
        kind = "a method" if inspect.isfunction(member) else f"a {member.__class__.__qualname__}"
    return ConfigError(
        f'{mapper.class_.__qualname__}.{name} cannot be in the key of "{publication.type}": it is {kind}.', cure=_CURE
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a row must be known for its key."""

    # Whether the session knows the key of a row by the row's identity alone.
    by_identity: bool
    columns: Mapping[str, sa.Column[Any]]


_plans: WeakKeyDictionary[orm.Mapper[Any], tuple[Publication, Plan]] = WeakKeyDictionary()


def plan(publication: Publication, mapper: orm.Mapper[Any]) -> Plan:
    """Raises `ConfigError` for a key that cannot be evaluated on what an object was."""
    known = _plans.get(mapper)
    if known is None or known[0] is not publication:
        known = _plans[mapper] = (publication, _plan(publication, mapper))
    return known[1]


def _plan(publication: Publication, mapper: orm.Mapper[Any]) -> Plan:
    columns = _columns(mapper)
    if callable(publication.key):
        return Plan(by_identity=False, columns=columns)
    names: list[str] = []
    for given in publication.names:
        name = given
        while name in mapper.synonyms:
            name = mapper.synonyms[name].name
        if name not in columns:
            computed = isinstance(_member(mapper, name), property | hybrid_property | cached_property)
            if not computed or name in mapper.relationships or name in mapper.column_attrs:
                raise refusal(publication, mapper, given)
            return Plan(by_identity=False, columns=columns)
        names.append(name)
    primary = _primary(mapper)
    return Plan(by_identity=set(names) <= set(primary), columns={name: columns[name] for name in names})


def _columns(mapper: orm.Mapper[Any]) -> dict[str, sa.Column[Any]]:
    return {
        attribute.key: attribute.columns[0]
        for attribute in mapper.column_attrs
        if isinstance(attribute.columns[0], sa.Column)
    }


def _primary(mapper: orm.Mapper[Any]) -> list[str]:
    return [mapper.get_property_by_column(column).key for column in mapper.primary_key]


def key_now(publication: Publication, target: object) -> str:
    """The key of an object that was just read again."""
    return publication.key_of(View(publication, state_of(target).mapper, lambda name: getattr(target, name)))


def key_by_identity(publication: Publication, state: orm.InstanceState[Any]) -> str:
    """The key of a row whose key is in its primary key, without asking the database."""
    values = dict(zip(_primary(state.mapper), cast("Identity", state.identity), strict=True))
    return publication.key_of(View(publication, state.mapper, values.__getitem__))


def old_keys(
    session: orm.Session, some: Iterable[tuple[orm.InstanceState[Any], Publication]]
) -> dict[orm.InstanceState[Any], str]:
    """The keys that rows have in the database, one statement for each class; without those that have none."""
    keys: dict[orm.InstanceState[Any], str] = {}
    asked: dict[orm.Mapper[Any], dict[Identity, orm.InstanceState[Any]]] = {}
    publications: dict[orm.Mapper[Any], Publication] = {}
    for state, publication in some:
        if state.identity is None:
            continue
        if plan(publication, state.mapper).by_identity:
            keys[state] = key_by_identity(publication, state)
        else:
            asked.setdefault(state.mapper, {})[tuple(state.identity)] = state
            publications[state.mapper] = publication
    for mapper, states in asked.items():
        publication = publications[mapper]
        columns = plan(publication, mapper).columns
        names = list(columns)
        primary: Sequence[Any] = mapper.primary_key
        for row in read(session, mapper, [*primary, *columns.values()], list(states)):
            values = dict(zip(names, row[len(primary) :], strict=True))
            try:
                keys[states[tuple(row[: len(primary)])]] = publication.key_of(
                    View(publication, mapper, values.__getitem__)
                )
            except EntryKeyError:
                # It had no key that could have been published.
                continue
    return keys
