"""The consumer's half: a local, read-only copy of other services' entities, exactly once in its own database.

Needs the extra `read-model`. `docs/read-model.md` explains it. `Store` and what its methods take, give and raise are
for whoever writes a store; a service needs the rest.
"""

from __future__ import annotations

from outbox.errors import NeedsRebuildError, NotCaughtUpError, ParkedError, StoreError, StoreUnavailableError
from outbox.kafka.subscription import Place
from outbox.read_model.change import Bad, Change, Raw
from outbox.read_model.declared import Columns, Copy, Declared, Follow, Function, Tables
from outbox.read_model.model import AsyncRunning, ReadModel, Running, Status
from outbox.read_model.postgres import PostgresStore
from outbox.read_model.sqlite import SqliteStore
from outbox.read_model.store import (
    BadBuildError,
    Build,
    Claim,
    Facts,
    LostBuildError,
    Parked,
    RefusedError,
    Store,
    Transaction,
)
from outbox.read_model.tables import books, copy_table

__all__ = [
    "AsyncRunning",
    "Bad",
    "BadBuildError",
    "Build",
    "Change",
    "Claim",
    "Columns",
    "Copy",
    "Declared",
    "Facts",
    "Follow",
    "Function",
    "LostBuildError",
    "NeedsRebuildError",
    "NotCaughtUpError",
    "Parked",
    "ParkedError",
    "Place",
    "PostgresStore",
    "Raw",
    "ReadModel",
    "RefusedError",
    "Running",
    "SqliteStore",
    "Status",
    "Store",
    "StoreError",
    "StoreUnavailableError",
    "Tables",
    "Transaction",
    "books",
    "copy_table",
]
