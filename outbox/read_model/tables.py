"""The tables of a read model: those that it keeps its books in, and the plain copy of a topic.

They belong to the consuming service: make them by a revision of its own (`outbox.read_model.operations`), or take them
into its MetaData. `build` is `live`, or `new` while a rebuild goes on beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.types import JSON, DateTime

from outbox.read_model.declared import ENTRY_ID, KEY, STATE, UPDATED_AT

VERSION = 1
"""Of the bookkeeping tables; a store refuses others."""
PREFIX = "outbox_read_model"
# Texts are compared byte by byte, as Kafka does, whatever the database's collation.
_TEXT = Text().with_variant(Text(collation="C"), "postgresql")
_BIG = BigInteger().with_variant(Integer(), "sqlite")
# What leaves room for "__new" in a name of PostgreSQL's.
_LONGEST = 58


@dataclass(frozen=True)
class Books:
    """The bookkeeping tables, in one MetaData.

    - `models`: a row a model: the fingerprint of its mapping, when it was once complete, and what is asked of it.
    - `topics`: of each topic Kafka's id, and since when and up to when it is read.
    - `partitions`: of each partition the offset up to which it is applied, and the epoch of who may go on.
    - `keys`: entry ids that no row of the service's tables holds: of deleted entities, and of what functions write.
    - `parked`: messages that could not be applied, and why.
    """

    models: Table
    topics: Table
    partitions: Table
    keys: Table
    parked: Table

    @property
    def all(self) -> list[Table]:
        """All of them."""
        return [self.models, self.topics, self.partitions, self.keys, self.parked]


def books(metadata: MetaData, *, schema: str | None = None) -> Books:
    """The bookkeeping tables, taken into this MetaData."""

    def name() -> Column[str]:
        return Column("model", String(100), primary_key=True)

    def build() -> Column[str]:
        return Column("build", String(4), primary_key=True)

    return Books(
        models=Table(
            f"{PREFIX}_models",
            metadata,
            name(),
            Column("version", Integer, nullable=False),
            Column("fingerprint", String(16), nullable=False),
            # When all topics were first read to their ends; null: a part may be missing.
            Column("loaded_at", DateTime(timezone=True)),
            # A rebuild that is asked for, and why; null: none. And the fingerprint of the mapping that is wanted.
            Column("rebuild", Text),
            Column("rebuild_for", String(16)),
            # Whose the new build is; null: there is none.
            Column("build_token", String(32)),
            schema=schema,
        ),
        topics=Table(
            f"{PREFIX}_topics",
            metadata,
            name(),
            Column("topic", String(249), primary_key=True),
            # Kafka's id of the topic that was read: one that was made again has another.
            Column("topic_id", String(64)),
            # When it was first claimed.
            Column("began_at", DateTime(timezone=True)),
            # When it was last known to be read to its end.
            Column("current_at", DateTime(timezone=True)),
            schema=schema,
        ),
        partitions=Table(
            f"{PREFIX}_partitions",
            metadata,
            name(),
            build(),
            Column("topic", String(249), primary_key=True),
            Column("partition", Integer, primary_key=True),
            Column("next_offset", _BIG, nullable=False),
            # Counts claims: who claimed before may write no more.
            Column("epoch", _BIG, nullable=False),
            schema=schema,
        ),
        keys=Table(
            f"{PREFIX}_keys",
            metadata,
            name(),
            build(),
            Column("topic", String(249), primary_key=True),
            Column("key", _TEXT, primary_key=True),
            Column("entry_id", _BIG, nullable=False),
            Column("deleted", Boolean, nullable=False),
            # Seconds since 1970, when it was written: of deleted ones, for forgetting.
            Column("at", _BIG, nullable=False),
            schema=schema,
        ),
        parked=Table(
            f"{PREFIX}_parked",
            metadata,
            name(),
            build(),
            Column("topic", String(249), primary_key=True),
            Column("key", _TEXT, primary_key=True),
            Column("partition", Integer, nullable=False),
            Column("offset", _BIG, nullable=False),
            Column("entry_id", _BIG, nullable=False),
            Column("timestamp_ms", _BIG, nullable=False),
            Column("raw_key", LargeBinary),
            Column("value", LargeBinary),
            # Pairs of name and value, the value in base64.
            Column("headers", JSON, nullable=False),
            Column("reason", Text, nullable=False),
            Column("parked_at", DateTime(timezone=True), nullable=False),
            schema=schema,
        ),
    )


def copy_table(metadata: MetaData, name: str, *, schema: str | None = None) -> Table:
    """The table of a plain copy: key, state, entry id, time of change. Columns and indexes may be added to it."""
    return Table(
        name,
        metadata,
        Column(KEY, _TEXT, primary_key=True),
        Column(STATE, JSON().with_variant(JSONB(), "postgresql"), nullable=False),
        Column(ENTRY_ID, _BIG, nullable=False),
        Column(UPDATED_AT, DateTime(timezone=True), nullable=False),
        schema=schema,
    )


def shadow_name(name: str) -> str:
    """The name of a table's copy for a rebuild, and of what belongs to it; PostgreSQL's names have at most 63 bytes."""
    if len(name.encode()) > _LONGEST:
        name = f"{name.encode()[:40].decode(errors='ignore')}_{blake2b(name.encode(), digest_size=4).hexdigest()}"
    return f"{name}__new"


def shadows_of(tables: Sequence[Table]) -> dict[str, Table]:
    """The copies of tables for a rebuild, by the full names of the tables.

    They refuse what the tables refuse, and are found by the same indexes: a message that is parked in one is parked in
    the other. Of references those among the tables; what lies outside is looked at by the swap.
    """
    metadata = MetaData()
    made = {table.fullname: _shadow(metadata, table) for table in tables}
    for table in tables:
        for reference in table.foreign_key_constraints:
            if reference.referred_table.fullname not in made:
                continue
            to = made[reference.referred_table.fullname]
            made[table.fullname].append_constraint(
                ForeignKeyConstraint(
                    list(reference.column_keys),
                    [to.c[element.column.name] for element in reference.elements],
                    ondelete=reference.ondelete,
                    onupdate=reference.onupdate,
                    deferrable=reference.deferrable,
                    initially=reference.initially,
                )
            )
    return made


def _shadow(metadata: MetaData, table: Table) -> Table:
    made = table.to_metadata(metadata, name=shadow_name(table.name))
    for constraint in list(made.constraints):
        if isinstance(constraint, ForeignKeyConstraint):
            made.constraints.discard(constraint)
        else:
            # The server's choice: names are taken.
            constraint.name = None
    made.foreign_keys.clear()
    for column in made.columns:
        column.foreign_keys.clear()
    names = {index.name for index in table.indexes}
    for index in made.indexes:
        if index.name in names:
            index.name = quoted_name(shadow_name(str(index.name)), quote=None)
        # It cannot be done within a transaction, and the table is empty.
        index.dialect_options["postgresql"]["concurrently"] = False
    return made
