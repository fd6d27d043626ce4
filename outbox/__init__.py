"""Write the state of your entities into the outbox, in your own transaction.

Every name is imported when it is first used: importing this package loads no driver, no SQLAlchemy and no Kafka.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from outbox._version import __version__
from outbox.errors import (
    BypassError,
    EntryError,
    EntryKeyError,
    HeadersError,
    OutboxError,
    SchemaError,
    StateError,
    StateTooLargeError,
    UnknownTypeError,
)

if TYPE_CHECKING:
    from outbox.app_source import AppSource
    from outbox.current import context
    from outbox.orm import part_of, published
    from outbox.writer import NewEntry, delete, lock, put, put_many

_HOMES = {
    "AppSource": "outbox.app_source",
    "context": "outbox.current",
    "NewEntry": "outbox.writer",
    "delete": "outbox.writer",
    "lock": "outbox.writer",
    "part_of": "outbox.orm",
    "published": "outbox.orm",
    "put": "outbox.writer",
    "put_many": "outbox.writer",
}

__all__ = [
    "AppSource",
    "BypassError",
    "EntryError",
    "EntryKeyError",
    "HeadersError",
    "NewEntry",
    "OutboxError",
    "SchemaError",
    "StateError",
    "StateTooLargeError",
    "UnknownTypeError",
    "__version__",
    "context",
    "delete",
    "lock",
    "part_of",
    "published",
    "put",
    "put_many",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
