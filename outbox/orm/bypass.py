"""Bulk statements on published classes are refused: they go around the unit of work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from outbox.errors import BypassError
from outbox.orm.publication import parts, publication_of, publications, ways_of

BYPASS = "outbox_bypass"


def do_orm_execute(execution: orm.ORMExecuteState) -> None:
    """Refuse what would change published rows without an entry."""
    if execution.is_select or not (execution.is_update or execution.is_delete or execution.is_insert):
        return
    if execution.execution_options.get(BYPASS):
        return
    mapper = execution.bind_mapper
    if mapper is not None:
        cls = next(
            (m.class_ for m in mapper.self_and_descendants if publication_of(m.class_) or ways_of(m.class_)), None
        )
    else:
        table = getattr(execution.statement, "table", None)
        cls = next((cls for cls in (*publications, *parts) if table in _tables(cls)), None)
    if cls is not None:
        raise BypassError(
            f"A bulk statement on {cls.__qualname__} goes around the unit of work: no entry would be written.",
            cure="Change the objects and flush; or pass execution_options(outbox_bypass=True) and write the entries "
            "with outbox.put_many in the same transaction, from states read after the statement.",
        )


def _tables(cls: type[Any]) -> Iterable[object]:
    mapper = sa.inspect(cls, raiseerr=False)
    return () if mapper is None else mapper.tables
