"""The shop's entities. The decorator is all that publishing a class takes."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import outbox


class Base(DeclarativeBase):
    pass


def customer_state(customer: Customer) -> dict[str, Any]:
    """The full current state that other services get."""
    return {"id": customer.id, "name": customer.name, "city": customer.city}


@outbox.published(type="customer", key="id", state=customer_state)
class Customer(Base):
    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str]


class Price(Base):
    """Published by an explicit call: see service.py."""

    __tablename__ = "price"

    article: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
