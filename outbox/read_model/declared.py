"""What a consumer declares: which topics it follows, and how a message becomes rows of its own tables.

ReadModel("search", store, [
Follow("shop.customer", Copy(customers)),
Follow("shop.advert", Columns(adverts, {"title": "title", "price": ("price", Decimal)})),
Follow("shop.user", Function(denormalise, writes=[adverts])),
])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from sqlalchemy import Column, Connection, Table, schema

from outbox.errors import ConfigError
from outbox.read_model.change import Change, Decode, decode_json

KEY, STATE, ENTRY_ID, UPDATED_AT = "key", "state", "entry_id", "updated_at"
"""The columns of a plain copy; `entry_id` and `updated_at` may be in a table of one's own, too."""

_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")

Convert = Callable[[Any], Any]


class Tables(Protocol):
    """Where a function of the service's writes: the transaction's connection, and the tables of this build."""

    @property
    def connection(self) -> Connection:
        """SQLAlchemy's, within the transaction: it must not be committed or closed."""

    def __getitem__(self, table: Table) -> Table:
        """The table to write to, for one that is declared: itself, or while a rebuild goes on its copy."""


class Applies(Protocol):
    """A function of the service's: applies some changes, of each key the last; called within the transaction."""

    def __call__(self, tables: Tables, changes: Sequence[Change], /) -> None:
        """Write what the changes say."""


@dataclass(frozen=True)
class Copy:
    """Keep key, state (JSON), entry id and time of change as they are, in a table that `copy_table` makes."""

    table: Table

    def __post_init__(self) -> None:
        _check_columns(self.table, [KEY, STATE, ENTRY_ID, UPDATED_AT])

    @property
    def writes(self) -> Sequence[Table]:
        """The tables that it writes."""
        return [self.table]

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it writes."""
        return [KEY, STATE, ENTRY_ID, UPDATED_AT]

    def described(self) -> str:
        """What another way of making rows differs in."""
        return f"copy {_described(self.table, self.columns)}"


@dataclass(frozen=True)
class Columns:
    """Keep chosen values of the state in columns of a table of one's own.

    `values` maps a column's name to a member of the state (`"address.city"` goes into objects; one that is missing is
    null), to a pair of a member and what converts it (`("price", Decimal)`; null stays null), or to a function of the
    `Change`. Values are converted to the column's type: numbers, dates and times, UUIDs. `key` is the column of the
    entity's key, the table's primary key. Where the table has the columns `entry_id` and `updated_at` they are kept;
    without `entry_id` the store keeps it apart, which costs a second row for each.

    `version` says that a function in `values` means something else now: the model is rebuilt.
    """

    table: Table
    values: Mapping[str, str | tuple[str, Convert] | Callable[[Change], Any]]
    key: str = KEY
    version: int = 0

    def __post_init__(self) -> None:
        _check_columns(self.table, [self.key, *self.values])
        if [column.name for column in self.table.primary_key] != [self.key]:
            raise ConfigError(
                f"The primary key of {self.table.name} is not the column {self.key}.",
                cure="Let it be the entity's key alone; other columns may be unique.",
            )
        if self.table.c[self.key].identity is not None:
            raise _generated(self.table, self.key)
        own = {self.key, ENTRY_ID, UPDATED_AT} & self.values.keys()
        if own:
            raise ConfigError(
                f"{', '.join(sorted(own))} of {self.table.name} is filled by itself.", cure="Leave it out."
            )
        for name, how in self.values.items():
            pair = isinstance(how, tuple) and len(how) == 2 and isinstance(how[0], str) and callable(how[1])
            if not (isinstance(how, str) or pair or callable(how)):
                raise ConfigError(
                    f"{how!r} does not say what the column {name} of {self.table.name} is filled with.",
                    cure='Give it a member of the state, "name"; a pair of one and what converts it, ("name", '
                    "str.upper); or a function of the change.",
                )
        filled = {self.key, ENTRY_ID, UPDATED_AT, *self.values}
        if empty := [column.name for column in self.table.c if column.name not in filled and _must_be_given(column)]:
            raise ConfigError(
                f"{', '.join(empty)} of {self.table.name} may not be null, has no default, and is filled with nothing.",
                cure="Say what it is filled with, or let it be nullable.",
            )

    @property
    def writes(self) -> Sequence[Table]:
        """The tables that it writes."""
        return [self.table]

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it writes."""
        own = [name for name in (ENTRY_ID, UPDATED_AT) if name in self.table.c]
        return [self.key, *self.values, *own]

    def described(self) -> str:
        """What another way of making rows differs in; of a function only its name and `version`."""
        of = ", ".join(f"{name}={_named(value)}" for name, value in sorted(self.values.items()))
        return f"columns {_described(self.table, self.columns)} key={self.key} {of} version={self.version}"


@dataclass(frozen=True)
class Function:
    """Have a function of the service's write, in the same transaction: of several topics into one table, for example.

    `writes` are all tables that it writes; it names them as `tables[table]`, which is a copy while a rebuild goes on.
    Their primary keys are the function's to give, or a rebuild would not know which rows are the same. It may be called
    for fewer changes than came, one by one, to find the one that fails: what it writes for a change must not depend on
    those beside it. Models that have such a function apply one batch at a time, whatever the number
    of their processes, so that two topics never miss each other. `version` says that it does something else now.
    """

    function: Applies
    writes: Sequence[Table]
    version: int = 0

    def __post_init__(self) -> None:
        for table in self.writes:
            _check_columns(table, [])
            _check_key_is_given(table)

    def described(self) -> str:
        """What another way of making rows differs in: the function's name, its tables, `version`."""
        tables = ", ".join(_described(table, [c.name for c in table.c]) for table in self.writes)
        return f"function {_named(self.function)} {tables} version={self.version}"


Into = Copy | Columns | Function


@dataclass(frozen=True)
class Follow:
    """A topic, and what becomes of its messages.

    `type`: the entity type that it carries, for `wait_for`; default: the topic's name. `decode`: of a message that is
    no JSON; `version` says that it reads them otherwise now.
    """

    topic: str
    into: Into
    type: str = ""
    decode: Decode = decode_json
    version: int = 0

    def __post_init__(self) -> None:
        if not _TOPIC.fullmatch(self.topic):
            raise ConfigError(
                f"{self.topic!r} cannot be the name of a topic.",
                cure="Kafka's have letters, digits, dots, _ and - alone.",
            )

    @property
    def name(self) -> str:
        """The entity type."""
        return self.type or self.topic


@dataclass(frozen=True)
class Declared:
    """A read model: its name, the consumer group; what it follows."""

    name: str
    follows: Sequence[Follow]
    by_topic: Mapping[str, Follow] = field(init=False)

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or len(self.name) > 100:
            raise ConfigError(f"{self.name!r} cannot be the name of a read model.", cure="Use up to 100 characters.")
        if not self.follows:
            raise ConfigError(f"The read model {self.name} follows no topic.", cure="Name one: Follow(topic, into).")
        by_topic = {one.topic: one for one in self.follows}
        if len(by_topic) < len(self.follows):
            raise ConfigError(f"The read model {self.name} follows a topic twice.", cure="Name each once.")
        if len({one.name for one in self.follows}) < len(self.follows):
            raise ConfigError(
                f"Two topics of the read model {self.name} have one type=.", cure="Give each the type that it carries."
            )
        plain = [
            table.fullname for one in self.follows if not isinstance(one.into, Function) for table in one.into.writes
        ]
        if len(set(plain)) < len(plain):
            raise ConfigError(
                f"Two topics of the read model {self.name} are kept in one table, where their keys would meet.",
                cure="Use a Function for what comes from two topics.",
            )
        object.__setattr__(self, "by_topic", by_topic)

    @property
    def tables(self) -> Sequence[Table]:
        """All tables that it writes, each once."""
        return list({table.fullname: table for one in self.follows for table in one.into.writes}.values())

    @property
    def serial(self) -> bool:
        """Whether its batches are applied one at a time, whoever applies them."""
        return any(isinstance(one.into, Function) for one in self.follows)

    @property
    def fingerprint(self) -> str:
        """What tells one way of making rows from another."""
        told = [(one.topic, one.into.described(), _named(one.decode), one.version) for one in self.follows]
        return blake2b(repr(sorted(told)).encode(), digest_size=8).hexdigest()

    def follow(self, type_or_topic: str) -> Follow:
        """By the entity type or the topic; `ConfigError` when there is none."""
        for one in self.follows:
            if type_or_topic in {one.name, one.topic}:
                return one
        raise ConfigError(
            f'The read model {self.name} does not follow "{type_or_topic}".',
            cure=f"It follows {', '.join(one.name for one in self.follows)}.",
        )


def _check_columns(table: Table, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in table.c]:
        raise ConfigError(
            f"The table {table.name} has no column {', '.join(missing)}.", cure="Name columns that it has."
        )
    if not list(table.primary_key):
        raise ConfigError(f"The table {table.name} has no primary key.", cure="Give it one: a rebuild compares by it.")


def _must_be_given(column: Column[Any]) -> bool:
    made = column.server_default, column.default, column.identity, column.computed
    return not column.nullable and all(one is None for one in made)


def _check_key_is_given(table: Table) -> None:
    for column in table.primary_key:
        # SQLAlchemy lets the server count a primary key that is one whole number, unless it is told not to.
        counted = column is table.autoincrement_column or isinstance(column.default, schema.Sequence)
        if counted or column.identity is not None:
            raise _generated(table, column.name)


def _generated(table: Table, column: str) -> ConfigError:
    return ConfigError(
        f"The primary key {column} of {table.name} is made by the server: a rebuild would make other keys of the same "
        "messages.",
        cure="Let the entity's key be it; if what is written says the number, declare the column autoincrement=False.",
    )


def _described(table: Table, columns: Sequence[str]) -> str:
    def of(column: Column[Any]) -> str:
        return f"{column.name} {column.type!r}"

    return f"{table.fullname}({', '.join(of(table.c[name]) for name in columns)})"


def _named(value: object) -> str:
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_named, value))})"
    # Not its module: that of a program that is run by its file has another name than when it is imported.
    return str(getattr(value, "__qualname__", value.__class__.__qualname__))
