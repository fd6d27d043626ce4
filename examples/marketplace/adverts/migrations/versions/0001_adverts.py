"""Adverts, and the outbox that publishes them."""

import sqlalchemy as sa
from alembic import op

import outbox.operations  # noqa: F401  registers op.outbox_...

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "adverts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("seller", sa.Integer, nullable=False),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("text", sa.String, nullable=False),
        sa.Column("price", sa.Numeric(12, 2), nullable=False),
    )
    op.outbox_create(name="adverts", version=1)
    op.outbox_add_type("advert", topic="market.advert", partitions=3)


def downgrade() -> None:
    op.outbox_remove_type("advert")
    op.outbox_drop()
    op.drop_table("adverts")
