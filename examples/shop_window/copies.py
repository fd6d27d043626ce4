"""Another service's copy of the shop's customers: readable while the shop, its relay and Kafka are down."""

from __future__ import annotations

import os

from sqlalchemy import MetaData, select

from outbox.read_model import Copy, Follow, ReadModel, SqliteStore, copy_table

customers = copy_table(MetaData(), "customer_copy")
store = SqliteStore("window.db")
model = ReadModel(
    "window",
    store,
    [Follow("shop.customer", Copy(customers))],
    bootstrap=os.environ["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"],
)

if __name__ == "__main__":
    store.create(model.declared)  # a service with Alembic makes its tables by a revision
    with model.running() as copies:  # or a process of its own: outbox read-model run --app copies:model
        copies.wait_ready(timeout=60)
        with store.engine.connect() as connection:
            for row in connection.execute(select(customers.c.key, customers.c.state)):
                print(row.key, row.state)
