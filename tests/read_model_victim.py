"""A consumer that kills itself between two of its calls.

`python -m read_model_victim PLACE N URL BOOTSTRAP TOPIC NAME`: at the Nth passing of PLACE (`never`: it runs on) it
sends itself SIGKILL; at `freeze`, before a transaction, of which the first ones claim and forget and all others apply
what was fetched, SIGSTOP. `unfenced` freezes there too, and its store asks nobody whether the partition is still its
own. PLACE `wrong` is another consumer, as many write it: the offsets are committed to Kafka after the data, and at the
Nth batch it dies between the two. NAME is the member's (`-`: none). What it does is said on standard output, an event
and its fields a line.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer
from sqlalchemy import BigInteger, Column, MetaData, Table, Text, create_engine
from sqlalchemy.dialects.postgresql import insert

from outbox.kafka.subscription import Place
from outbox.read_model import Change, Follow, Function, PostgresStore, ReadModel, Tables
from outbox.read_model.sql import SqlTransaction
from outbox.read_model.store import Build, Claim
from outbox.wake import Wake

PLACES = ("after the fetch", "after the offset", "after the rows", "before the commit", "after the commit")

metadata = MetaData()
applied = Table(
    "applied",
    metadata,
    Column("key", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("times", BigInteger, nullable=False),
)


def apply(tables: Tables, changes: Sequence[Change]) -> None:
    """Keep the state, and count how often it was told: of keys that have one message it must be once."""
    table = tables[applied]
    for change in changes:
        made = insert(table).values(key=change.key, state=str(change.state["n"]), times=1)
        tables.connection.execute(
            made.on_conflict_do_update(
                index_elements=["key"], set_={"state": made.excluded.state, "times": table.c.times + 1}
            )
        )


FREEZING = ("freeze", "unfenced")


class Trigger:
    """Kills, or freezes, at the Nth passing."""

    def __init__(self, place: str, number: int) -> None:
        self.fenced = place != "unfenced"
        self._place, self._left = "before the transaction" if place in FREEZING else place, number
        self._signal = signal.SIGSTOP if place in FREEZING else signal.SIGKILL

    def passes(self, place: str) -> None:
        """It passes a place."""
        if place == self._place:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)


class VictimStore(PostgresStore):
    """A store whose transactions pass the places."""

    trigger: Trigger

    @contextmanager
    def transaction(self, build: Build = "live", *, reads: bool = False) -> Iterator[Any]:
        if not reads:
            self.trigger.passes("before the transaction")
        with super().transaction(build, reads=reads) as transaction:
            yield VictimTransaction(transaction, self.trigger) if not reads else transaction
            if not reads:
                self.trigger.passes("before the commit")
        if not reads:
            self.trigger.passes("after the commit")


class VictimTransaction:
    """A transaction that passes the places."""

    def __init__(self, inner: SqlTransaction, trigger: Trigger) -> None:
        self._inner, self._trigger = inner, trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def advance(self, place: Place, claim: Claim, offset: int) -> bool:
        self._trigger.passes("after the fetch")
        if not self._trigger.fenced:
            claim = self._inner.claim(place)
        went = self._inner.advance(place, claim, offset)
        self._trigger.passes("after the offset")
        return went

    def put(self, *arguments: Any) -> None:
        self._inner.put(*arguments)
        self._trigger.passes("after the rows")


def model(
    url: str, bootstrap: str, topic: str, trigger: Trigger | None = None, *, name: str | None = "one"
) -> ReadModel:
    """The read model; `name`: the member's."""
    store = VictimStore(url) if trigger is not None else PostgresStore(url)
    if isinstance(store, VictimStore) and trigger is not None:
        store.trigger = trigger
    kafka = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "500"}
    follow = Follow(topic, Function(apply, writes=[applied]))
    return ReadModel(
        topic, store, [follow], bootstrap=bootstrap, kafka=kafka, instance=name, batch=50, check_seconds=0.2
    )


def wrong(number: int, url: str, bootstrap: str, topic: str) -> None:
    """Data first, offsets to Kafka after."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap, "group.id": f"{topic}-wrong", "enable.auto.commit": False,
            "isolation.level": "read_committed", "auto.offset.reset": "earliest", "group.instance.id": "one",
            "session.timeout.ms": "6000",
        }
    )  # fmt: skip
    consumer.subscribe([topic])
    while True:
        messages = [one for one in consumer.consume(50, 0.2) if one.error() is None]
        if not messages:
            continue
        with engine.begin() as connection:
            for message in messages:
                made = insert(applied).values(key=(message.key() or b"").decode(), state="?", times=1)
                connection.execute(
                    made.on_conflict_do_update(index_elements=["key"], set_={"times": applied.c.times + 1})
                )
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        consumer.commit(asynchronous=False)


class Said(logging.Handler):
    """Events, for the test that reads them."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = record.__dict__.get("outbox_fields", {})
        line = json.dumps({"event": record.__dict__.get("outbox_event"), **fields}, default=str)
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    place, number, url, bootstrap, topic, name = sys.argv[1:]
    if place == "wrong":
        wrong(int(number), url, bootstrap, topic)
    assert place in {*PLACES, *FREEZING, "never"}
    logging.getLogger("outbox").addHandler(Said())
    logging.getLogger("outbox").setLevel("INFO")
    model(url, bootstrap, topic, Trigger(place, int(number)), name=None if name == "-" else name).run(Wake())
