"""Who sells."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import outbox


class Base(DeclarativeBase):
    pass


def user_state(user: User) -> dict[str, Any]:
    """What other services get: not the password."""
    return {"id": user.id, "name": user.name, "city": user.city}


@outbox.published(type="user", key="id", state=user_state)
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str]
    password: Mapped[str]
