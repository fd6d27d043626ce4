"""Where PostgreSQL and SQLite differ, and the statements that are made of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Column, Connection, Table, bindparam
from sqlalchemy import exc as sa
from sqlalchemy.sql.elements import ColumnElement

from outbox.errors import StoreError, StoreUnavailableError
from outbox.read_model.rows import Row
from outbox.read_model.store import RefusedError

Blame = Literal["moment", "values", "setting"]
"""What an error is about: the server's moment, so that trying again may help; the values that it was given; or what
neither mends: a missing table, a privilege."""


class Dialect:
    """Base of the stores in SQL. `insert` is the dialect's own."""

    def __init__(self, insert: Any) -> None:
        self.insert = insert

    # -- where they differ -------------------------------------------------------------------------------------

    def alone(self, connection: Connection, what: str) -> None:
        """Let no other transaction that is to be alone with the same go on until this one ends."""
        raise NotImplementedError

    def unhurried(self, connection: Connection) -> None:
        """Let the statements of this transaction take as long as they need."""
        raise NotImplementedError

    def among(self, column: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
        """A condition: the column has one of these values, however many."""
        raise NotImplementedError

    def insert_rows(self, connection: Connection, table: Table, names: Sequence[str], rows: Sequence[Row]) -> None:
        """Insert rows of keys that are not there."""
        connection.execute(self.insert(table), [dict(zip(names, row, strict=True)) for row in rows])

    def upsert_rows(
        self, connection: Connection, table: Table, names: Sequence[str], key: str, rows: Sequence[Row]
    ) -> None:
        """Insert rows, or replace those with their keys, of which some are there."""
        values = [dict(zip(names, row, strict=True)) for row in rows]
        connection.execute(self.upsert(table, names, [key]), values)

    def blame(self, error: BaseException) -> Blame:
        """What the driver's error is about."""
        raise NotImplementedError

    def cure(self, error: BaseException) -> str:
        """What mends an error that is neither of the moment nor of the values."""
        raise NotImplementedError

    def come_back(self) -> str:
        """What may have to be done until it can be used again."""
        return "Check that it runs and that the store's URL points at it."

    def has_equality(self, column: Column[Any]) -> bool:
        """Whether its values can be compared."""
        raise NotImplementedError

    # -- statements --------------------------------------------------------------------------------------------

    def upsert(self, table: Table, names: Sequence[str], keys: Sequence[str], *, kept: Collection[str] = ()) -> Any:
        """A statement that inserts a row, or replaces the columns of the one with its keys, but for those `kept`."""
        made = self.insert(table).values({name: bindparam(name) for name in names})
        rest = {name: made.excluded[name] for name in names if name not in keys and name not in kept}
        return (
            made.on_conflict_do_update(index_elements=list(keys), set_=rest) if rest else made.on_conflict_do_nothing()
        )

    def ensure(self, table: Table, values: Mapping[str, Any]) -> Any:
        """A statement that inserts a row unless one is there."""
        return self.insert(table).values(dict(values)).on_conflict_do_nothing()

    # -- errors ------------------------------------------------------------------------------------------------

    def translate(self, error: sa.StatementError) -> StoreError | StoreUnavailableError | RefusedError:
        """The store's error for SQLAlchemy's."""
        cause = error.orig or error
        said = str(cause).strip().partition("\n")[0]
        if not isinstance(error, sa.DBAPIError):
            return RefusedError(said)  # a value that does not become one of the driver's
        blame = "moment" if error.connection_invalidated else self.blame(cause)
        if blame == "moment":
            return StoreUnavailableError(
                f"The read model's database cannot be used now: {said}.", cure=self.come_back()
            )
        if blame == "values":
            return RefusedError(said)
        return StoreError(f"The read model's database refuses it: {said}.", cure=self.cure(cause))
