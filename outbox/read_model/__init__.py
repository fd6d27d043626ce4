"""The consumer's half: a local, read-only copy of other services' entities, exactly once in its own database.

Needs the extra `read-model`. `docs/read-model.md` explains it.
"""

from __future__ import annotations

from outbox.errors import NeedsRebuildError, ParkedError, StoreError, StoreUnavailableError
from outbox.read_model.change import Change
from outbox.read_model.declared import Columns, Copy, Follow, Function, Tables
from outbox.read_model.model import AsyncRunning, ReadModel, Running, Status
from outbox.read_model.postgres import PostgresStore
from outbox.read_model.sqlite import SqliteStore
from outbox.read_model.store import Store, Transaction
from outbox.read_model.tables import books, copy_table

__all__ = [
    "AsyncRunning",
    "Change",
    "Columns",
    "Copy",
    "Follow",
    "Function",
    "NeedsRebuildError",
    "ParkedError",
    "PostgresStore",
    "ReadModel",
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
