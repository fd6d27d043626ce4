"""The Alembic environment for a database without one; `outbox migrate` runs it."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

import outbox.operations
from outbox.schema import create_schema

assert outbox.operations  # registers op.outbox_create and its sisters

attributes = context.config.attributes
schema: str = attributes["outbox_schema"]
connection: Connection | None = attributes.get("connection")

if connection is None:
    # A script for somebody else to run.
    context.configure(
        url="postgresql+psycopg://",
        literal_binds=True,
        version_table="alembic_version",
        version_table_schema=schema,
    )
    context.get_context().impl.static_output(create_schema(schema) + ";\n")
    with context.begin_transaction():
        context.run_migrations()
else:
    context.configure(connection=connection, version_table="alembic_version", version_table_schema=schema)
    with context.begin_transaction():
        context.run_migrations()
