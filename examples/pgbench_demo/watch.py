"""What the live view shows: a `read_committed` consumer of the topics, and the relay's own positions."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from outbox.position import Position, Totals
from outbox.topic import positions_topic

SAMPLE = 200
"""How many records' latencies are looked up at each look: a fair sample, at little cost for the database."""
LISTEN_SECONDS = 30.0
RECENT = 10
"""Over how many looks the live percentiles go."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the commit of a transaction to the moment at which the consumer has its record."""

    p50: float
    p99: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency | None:
        """The percentiles, or None without samples."""
        if not milliseconds:
            return None
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(ordered[round(last * 0.5)], ordered[round(last * 0.99)], len(ordered))


@dataclass(frozen=True)
class Look:
    """One look at everything.

    `totals`: what the relay has published, by entity type; `unpublished`: committed entries that wait; `rates`:
    entries a second since the look before, by type; `latency`: of the last looks.
    """

    totals: Mapping[str, Totals]
    unpublished: int
    rates: Mapping[str, float] = field(default_factory=dict)
    latency: Latency | None = None

    @property
    def entries(self) -> int:
        """Entries published, of all types."""
        return sum(t.entries for t in self.totals.values())

    @property
    def records(self) -> int:
        """Records written, of all types."""
        return sum(t.records for t in self.totals.values())


class Watch:
    """Consumes in a thread of its own from `__enter__` to `__exit__`; `look()` is for one other thread.

    Positions from the start of the log; states only from the call of `listen` on, from the end of their topics. The
    server must run with `track_commit_timestamp`: the time of a commit is PostgreSQL's, on the same machine's clock.
    """

    def __init__(self, url: str, bootstrap: str, *, name: str, topics: Sequence[str]) -> None:
        self._topics = topics
        self._positions = positions_topic(name)
        # Never joined and never committed to; librdkafka wants a group.
        client = {
            "bootstrap.servers": bootstrap,
            "isolation.level": "read_committed",
            "group.id": f"{name}-demo",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 10,
            "log_level": 0,
        }
        # One a thread: a call that changes what a consumer reads waits for ever while another thread polls it.
        self._position_consumer, self._state_consumer = Consumer(client), Consumer(client)
        self._database = psycopg.connect(url, autocommit=True, application_name="pgbench_demo")
        self._threads = [
            threading.Thread(target=self._consume, args=(consumer,), daemon=True)
            for consumer in (self._position_consumer, self._state_consumer)
        ]
        self._stop = threading.Event()
        self._failed: Exception | None = None
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._arrived: list[tuple[int, float]] = []
        self._recent: deque[list[float]] = deque(maxlen=RECENT)
        self._all: list[float] = []
        self._before: tuple[float, Mapping[str, Totals]] | None = None

    def __enter__(self) -> Self:
        self._position_consumer.assign([TopicPartition(self._positions, 0, OFFSET_BEGINNING)])
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(5)
        self._position_consumer.close()
        self._state_consumer.close()
        self._database.close()

    def listen(self) -> None:
        """From now on, measure how long states take to arrive; what is in the topics already is left out."""
        topics = self._state_consumer.list_topics(timeout=LISTEN_SECONDS).topics
        # Explicit offsets: an end that is looked up later would leave out what came in between.
        places = [TopicPartition(topic, partition) for topic in self._topics for partition in topics[topic].partitions]
        for place in places:
            place.offset = self._state_consumer.get_watermark_offsets(place, timeout=LISTEN_SECONDS)[1]
        # Before its thread starts: see `__init__`.
        self._state_consumer.assign(places)
        self._threads[1].start()

    def look(self) -> Look:
        """How things are now. Raises `KafkaException` when the consumer has failed."""
        if self._failed is not None:
            raise self._failed
        with self._lock:
            position, arrived, self._arrived = self._position, self._arrived, []
        self._measure(arrived)
        totals = dict(position.totals) if position is not None else {}
        now = time.monotonic()
        rates: dict[str, float] = {}
        if self._before is not None:
            then, earlier = self._before
            for name, total in totals.items():
                rates[name] = (total.entries - earlier.get(name, Totals()).entries) / max(now - then, 0.001)
        self._before = now, totals
        recent = [latency for look in self._recent for latency in look]
        return Look(totals, self._unpublished(position), rates, Latency.of(recent))

    def latency(self) -> Latency | None:
        """Over everything that was measured."""
        return Latency.of(self._all)

    def _measure(self, arrived: Sequence[tuple[int, float]]) -> None:
        chosen = dict(arrived if len(arrived) <= SAMPLE else random.sample(arrived, SAMPLE))
        measured: list[float] = []
        if chosen:
            committed = self._database.execute(
                "SELECT id, extract(epoch FROM pg_xact_commit_timestamp(xid::xid))::double precision "
                "FROM outbox.entries WHERE shard = 0 AND id = ANY (%s)",
                [list(chosen)],
            )
            measured = [(chosen[entry] - at) * 1000 for entry, at in committed if at is not None]
        self._recent.append(measured)
        self._all += measured

    def _unpublished(self, position: Position | None) -> int:
        # The relay's own rule is finer (see docs/position.md); by the id alone it is a matter of a few entries.
        floor = 0
        if position is not None:
            floor = position.cut.last_id if position.cut is not None else position.point.floor
        found = self._database.execute(
            "SELECT count(*) FROM outbox.entries WHERE shard = 0 AND id > %s", [floor]
        ).fetchone()
        return int(found[0]) if found else 0

    def _consume(self, consumer: Consumer) -> None:
        try:
            while not self._stop.is_set():
                # One at a time: a call for many would keep the first back until it had them all.
                message = consumer.poll(0.1)
                if message is not None:
                    self._take(message, time.time())
        except Exception as error:  # noqa: BLE001 - it is raised where somebody looks
            self._failed = error

    def _take(self, message: Message, now: float) -> None:
        error = message.error()
        if error is not None:
            if error.retriable() or error.code() == KafkaError._TRANSPORT:  # noqa: SLF001 - librdkafka's own codes are named so
                return
            raise KafkaException(error)
        value = message.value()
        if message.topic() == self._positions:
            if isinstance(value, bytes):
                position = Position.decode(value)
                with self._lock:
                    self._position = position
            return
        headers = cast("list[tuple[str, bytes]]", message.headers() or [])
        entry = next((int(text) for name, text in headers if name == "outbox-id"), 0)
        with self._lock:
            self._arrived.append((entry, now))
