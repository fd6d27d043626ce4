"""The outbox, version 1 of its schema."""

from __future__ import annotations

from alembic import context, op

import outbox.operations

assert outbox.operations  # registers the operations

revision = "outbox_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    given = context.config.attributes
    op.outbox_create(
        version=1,
        name=given["outbox_name"],
        schema=given["outbox_schema"],
        shards=given["outbox_shards"],
        retention=given["outbox_retention"],
        slots=given["outbox_slots"],
        doorbell=given["outbox_doorbell"],
        writers=given["outbox_writers"],
        relay=given["outbox_relay"],
    )


def downgrade() -> None:
    op.outbox_drop(version=1, schema=context.config.attributes["outbox_schema"])
