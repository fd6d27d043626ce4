"""What `search` keeps: an advert with its seller's name, and an index of its own."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Computed, Index, MetaData, Numeric, Table, Text
from sqlalchemy.dialects.postgresql import TSVECTOR

metadata = MetaData()

sellers = Table(
    "sellers",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("city", Text, nullable=False),
)

offers = Table(
    "offers",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("seller", BigInteger, nullable=False),
    # Of the users; null until they say it.
    Column("seller_name", Text),
    Column("city", Text),
    Column("title", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("price", Numeric(12, 2), nullable=False),
    Column(
        "words",
        TSVECTOR,
        Computed(
            "to_tsvector('english', title || ' ' || text || ' ' || coalesce(seller_name, '') || ' ' "
            "|| coalesce(city, ''))",
            persisted=True,
        ),
    ),
    Index("offers_words", "words", postgresql_using="gin"),
    Index("offers_seller", "seller"),
)
