"""What the shop does all day."""

from __future__ import annotations

import os

from models import Customer, Price
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import outbox


def main() -> None:
    url = os.environ["OUTBOX_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1)
    with Session(create_engine(url)) as session:
        # A published class: every flush that writes it writes its entry.
        ada = Customer(name="Ada", city="London")
        session.add_all([ada, Customer(name="Emmy", city="Erlangen")])
        session.flush()
        ada.city = "Turin"

        # An explicit call, in the same transaction. Lock or write the row first, read the state after that.
        price = session.merge(Price(article="tea", cents=420))
        session.flush()
        outbox.put(session, "price", price.article, {"article": price.article, "cents": price.cents})
        session.commit()
    print("two customers and a price are committed, with their entries")


if __name__ == "__main__":
    main()
