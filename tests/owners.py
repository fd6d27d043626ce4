"""An owning service of the tests: a table, an outbox, and its topic."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from devstack.kafka import Kafka
from outbox import requests
from relays import RelayProcess, eventually, must

SOURCE = "SELECT id::text AS key, to_jsonb(c) AS state, id FROM customer c"


@dataclass
class Owner:
    """An owning service: a table of customers, an outbox, and its topic."""

    url: str
    name: str
    env: dict[str, str]
    kafka: Kafka
    directory: Path
    running: RelayProcess = field(init=False)

    @property
    def topic(self) -> str:
        return f"{self.name}.customer"

    def sql(self, *statements: str) -> None:
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def add_type(self, source: str | None = SOURCE, *options: str) -> None:
        sourced = ["--source", source] if source is not None else []
        must(self.env, "types", "add", "customer", "--topic", self.topic, *sourced, *options)
        must(self.env, "topics", "apply", "--yes")

    @contextmanager
    def relay(self, **settings: object) -> Iterator[RelayProcess]:
        more = {f"OUTBOX_{key.upper()}": str(value) for key, value in settings.items()}
        with RelayProcess({**self.env, **more}, self.directory / "relay.log") as relay:
            relay.wait_event("relay.holds")
            yield relay
            assert relay.stop() == 0

    def ask(self, kind: str = "backfill", **arguments: Any) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return requests.ask(connection, "outbox", kind, {"type": "customer", **arguments})

    def outcome(self, number: int, *, seconds: float = 60) -> Mapping[str, Any]:
        """What became of a request, once the relay says it."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return eventually(
                lambda: requests.find(connection, "outbox", number=number)[0].outcomes.get(0),
                what=f"the end of request {number}",
                seconds=seconds,
            )

    def table(self) -> dict[str, Any]:
        """What the topic must hold."""
        with psycopg.connect(self.url) as connection:
            return dict(connection.execute("SELECT id::text, to_jsonb(c) FROM customer c").fetchall())


@contextmanager
def writing(
    url: str, count: int, change: Callable[[psycopg.Connection, random.Random], None], *, pause: float = 0.0
) -> Iterator[None]:
    """So many writers at once, each with a connection and a choice of its own, until the block ends; none may fail."""
    stop = threading.Event()
    failed: list[Exception] = []

    def write(seed: int) -> None:
        draw = random.Random(seed)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                while not stop.is_set():
                    change(connection, draw)
                    stop.wait(pause)
        except psycopg.Error as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(count)]
    for one in writers:
        one.start()
    try:
        yield
    finally:
        stop.set()
        for one in writers:
            one.join()
    assert failed == []
