"""Users, and the outbox that publishes them."""

import sqlalchemy as sa
from alembic import op

import outbox.operations  # noqa: F401  registers op.outbox_...

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("city", sa.String, nullable=False),
        sa.Column("password", sa.String, nullable=False),
    )
    op.outbox_create(name="users", version=1)
    op.outbox_add_type("user", topic="market.user", partitions=3)


def downgrade() -> None:
    op.outbox_remove_type("user")
    op.outbox_drop()
    op.drop_table("users")
