"""The read model that is measured: a plain copy, declared as a consuming service does, by its environment."""

from __future__ import annotations

import os

from sqlalchemy import MetaData

from outbox.read_model import Copy, Follow, PostgresStore, ReadModel, copy_table

metadata = MetaData()
TABLES = {"BENCH_TOPIC": "thing_copy", "BENCH_UPDATES": "update_copy"}
store = PostgresStore(os.environ["BENCH_DATABASE_URL"])
model = ReadModel(
    os.environ["BENCH_MODEL"],
    store,
    [Follow(os.environ[name], Copy(copy_table(metadata, table))) for name, table in TABLES.items()],
    bootstrap=os.environ["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"],
)

if __name__ == "__main__":
    store.create(model.declared)
