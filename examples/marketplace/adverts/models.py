"""What is sold."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy import Numeric
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import outbox


class Base(DeclarativeBase):
    pass


def advert_state(advert: Advert) -> dict[str, Any]:
    """What other services get. The seller is a number: whoever wants the name follows the users."""
    return {
        "id": advert.id,
        "seller": advert.seller,
        "title": advert.title,
        "text": advert.text,
        "price": str(advert.price),
    }


@outbox.published(type="advert", key="id", state=advert_state)
class Advert(Base):
    __tablename__ = "adverts"

    id: Mapped[int] = mapped_column(primary_key=True)
    seller: Mapped[int]
    title: Mapped[str]
    text: Mapped[str]
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))
