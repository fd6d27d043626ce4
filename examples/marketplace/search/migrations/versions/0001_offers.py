"""Offers and sellers, and the books of the read model that fills them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TSVECTOR

import outbox.read_model.operations  # noqa: F401  registers op.outbox_read_model_...

revision = "0001"
down_revision = None

WORDS = "to_tsvector('english', title || ' ' || text || ' ' || coalesce(seller_name, '') || ' ' || coalesce(city, ''))"


def upgrade() -> None:
    op.outbox_read_model_create()
    op.create_table(
        "sellers",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("city", sa.Text, nullable=False),
    )
    op.create_table(
        "offers",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seller", sa.BigInteger, nullable=False),
        sa.Column("seller_name", sa.Text),
        sa.Column("city", sa.Text),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("price", sa.Numeric(12, 2), nullable=False),
        sa.Column("words", TSVECTOR, sa.Computed(WORDS, persisted=True)),
    )
    op.create_index("offers_words", "offers", ["words"], postgresql_using="gin")
    op.create_index("offers_seller", "offers", ["seller"])


def downgrade() -> None:
    op.drop_table("offers")
    op.drop_table("sellers")
    op.outbox_read_model_drop()
