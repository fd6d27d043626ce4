"""The read model: two topics into one table, each message once, in one transaction with the offsets.

Each of the two functions reads what the other one writes. They need no lock for that: a model that has a function
applies one batch at a time, of whichever topic and in whichever process, so that neither misses what the other writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from marketplace.search.tables import offers, sellers
from outbox.read_model import Change, Follow, Function, PostgresStore, ReadModel, Tables


def users_say(tables: Tables, changes: Sequence[Change]) -> None:
    """A seller's name and city, also in the offers that are there."""
    known, theirs = tables[sellers], tables[offers]
    for change in changes:
        number = int(change.key)
        name = city = None
        if change.deleted:
            tables.connection.execute(known.delete().where(known.c.id == number))
        else:
            name, city = change.state["name"], change.state["city"]
            statement = insert(known).values(id=number, name=name, city=city)
            tables.connection.execute(
                statement.on_conflict_do_update(index_elements=["id"], set_={"name": name, "city": city})
            )
        tables.connection.execute(theirs.update().where(theirs.c.seller == number).values(seller_name=name, city=city))


def adverts_say(tables: Tables, changes: Sequence[Change]) -> None:
    """An offer, with what is known of its seller."""
    known, theirs = tables[sellers], tables[offers]
    for change in changes:
        number = int(change.key)
        if change.deleted:
            tables.connection.execute(theirs.delete().where(theirs.c.id == number))
            continue
        state = change.state
        seller = tables.connection.execute(select(known).where(known.c.id == state["seller"])).fetchone()
        values = {
            "seller": state["seller"],
            "seller_name": seller.name if seller else None,
            "city": seller.city if seller else None,
            "title": state["title"],
            "text": state["text"],
            "price": Decimal(state["price"]),
        }
        statement = insert(theirs).values(id=number, **values)
        tables.connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))


model = ReadModel(
    "search",
    PostgresStore(os.environ["SEARCH_DATABASE_URL"]),
    [
        Follow("market.user", Function(users_say, writes=[sellers, offers]), type="user"),
        Follow("market.advert", Function(adverts_say, writes=[offers, sellers]), type="advert"),
    ],
    bootstrap=os.environ["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"],
)
