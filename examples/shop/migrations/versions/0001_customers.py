"""customers and prices"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "customer",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("city", sa.String, nullable=False),
    )
    op.create_table(
        "price",
        sa.Column("article", sa.String, primary_key=True),
        sa.Column("cents", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("price")
    op.drop_table("customer")
