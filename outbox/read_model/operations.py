"""Alembic operations of the consuming service.

`import outbox.read_model.operations` in a revision, then

    op.outbox_read_model_create()                    # the books; once
    op.outbox_read_model_copy("customer_copy")       # the table of a plain copy

and, down, `op.outbox_read_model_drop_copy`, `op.outbox_read_model_drop`. Tables of the service's own it makes as ever.
Autogenerate leaves the books alone; a copy is in the service's MetaData, where `copy_table` puts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alembic.autogenerate import comparators
from alembic.autogenerate.api import AutogenContext
from alembic.operations import Operations
from alembic.operations.ops import DropIndexOp, DropTableOp, ModifyTableOps, UpgradeOps
from alembic.util import DispatchPriority
from sqlalchemy import MetaData
from sqlalchemy.schema import CreateTable, DropTable, Table

from outbox.read_model.tables import PREFIX, books, copy_table, shadow_name


def _operation(name: str) -> Callable[[type[Any]], type[Any]]:
    return Operations.register_operation(name, "invoke")


def _create(operations: Operations, table: Table) -> None:
    operations.get_context().impl._exec(CreateTable(table))  # noqa: SLF001  op.execute(str) eats colons


def _drop(operations: Operations, table: Table) -> None:
    operations.get_context().impl._exec(DropTable(table))  # noqa: SLF001  as above


@_operation("outbox_read_model_create")
class ReadModelCreate:
    """`op.outbox_read_model_create`."""

    @classmethod
    def invoke(cls, operations: Operations, *, schema: str | None = None) -> None:
        """Make the books of read models."""
        for table in books(MetaData(), schema=schema).all:
            _create(operations, table)


@_operation("outbox_read_model_drop")
class ReadModelDrop:
    """`op.outbox_read_model_drop`."""

    @classmethod
    def invoke(cls, operations: Operations, *, schema: str | None = None) -> None:
        """Remove the books of read models."""
        for table in reversed(books(MetaData(), schema=schema).all):
            _drop(operations, table)


@_operation("outbox_read_model_copy")
class ReadModelCopy:
    """`op.outbox_read_model_copy`."""

    @classmethod
    def invoke(cls, operations: Operations, name: str, *, schema: str | None = None) -> None:
        """Make the table of a plain copy."""
        _create(operations, copy_table(MetaData(), name, schema=schema))


@_operation("outbox_read_model_drop_copy")
class ReadModelDropCopy:
    """`op.outbox_read_model_drop_copy`."""

    @classmethod
    def invoke(cls, operations: Operations, name: str, *, schema: str | None = None) -> None:
        """Remove the table of a plain copy."""
        _drop(operations, copy_table(MetaData(), name, schema=schema))


@comparators.dispatch_for("schema", priority=DispatchPriority.LAST)
def _leave_books_alone(context: AutogenContext, upgrade: UpgradeOps, _schemas: object) -> None:
    """Autogenerate would drop what the service's MetaData does not have: the books, and copies of a rebuild."""
    copies = {shadow_name(table.name) for table in context.sorted_tables}

    def ours(operation: object) -> bool:
        name = getattr(operation, "table_name", "") or ""
        return isinstance(operation, DropTableOp | DropIndexOp | ModifyTableOps) and (
            name.startswith(f"{PREFIX}_") or name in copies
        )

    upgrade.ops[:] = [operation for operation in upgrade.ops if not ours(operation)]
