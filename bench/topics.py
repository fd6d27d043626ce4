"""Topics as a `read_committed` consumer sees them: made, watched from outside while they grow, read and judged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka import admin as kafka_admin
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from bench.measure import wait_for
from devstack.processes import ServerError
from outbox.kafka.client import list_offsets

PARTITIONS = 8
# confluent_kafka gives these no types.
_SPEC: Any = kafka_admin.OffsetSpec  # type: ignore[attr-defined]  # exported, but not in its __all__
_LATEST = _SPEC.latest()
_LOOK_SECONDS = 0.025
_ANSWER_SECONDS = 30.0
_QUIET_SECONDS = 1.5
# The controller has made a topic, and the broker is about to lead it.
Offsets = Mapping[int, int]
"""Of each partition the offset below which everything is committed."""


class Topics:
    """The topics of one broker."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})

    def make(self, name: str, *, partitions: int = PARTITIONS, settings: Mapping[str, str] | None = None) -> None:
        """Make a topic, and wait until it answers; nothing happens when it is there."""
        new = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(settings or {}))
        try:
            self._admin.create_topics([new])[name].result(_ANSWER_SECONDS)
        except KafkaException as exception:
            if exception.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise

        def led() -> bool:
            try:
                return len(self.ends(name)) == partitions
            except (KafkaException, KeyError):
                return False

        wait_for(led, seconds=_ANSWER_SECONDS, what=f"a leader for each partition of {name}")

    def ends(self, name: str) -> Offsets:
        """How far each partition is committed."""
        topic = self._admin.list_topics(name, timeout=_ANSWER_SECONDS).topics[name]
        return self._ends(name, list(topic.partitions))

    def _ends(
        self, name: str, partitions: list[int], isolation: IsolationLevel = IsolationLevel.READ_COMMITTED
    ) -> Offsets:
        asked = {TopicPartition(name, partition): _LATEST for partition in partitions}
        deadline = time.monotonic() + _ANSWER_SECONDS
        futures = list_offsets(self._admin, asked, isolation, there=True, deadline=deadline)
        return {found.partition: future.result().offset for found, future in futures.items()}

    def watch(
        self,
        name: str,
        starts: Offsets,
        *,
        began: float,
        done: Callable[[int], bool],
        check: Callable[[], None],
        seconds: float,
    ) -> Timeline:
        """Watch a topic grow until `done` (given how many offsets were added) holds and it has been quiet for a while.

        From outside, by asking for offsets: a consumer would take a share of the cores that grows with the speed of
        what is measured. Offsets count the markers of transactions too, so `done` is a lower bound and the records are
        counted afterwards. `check` raises when nothing more is to be waited for. Raises `ServerError` after `seconds`.
        """
        first: tuple[float, int] | None = None
        last = (began, 0)
        begin = sum(starts.values())
        while True:
            check()
            added = sum(self._ends(name, list(starts)).values()) - begin
            now = time.monotonic()
            if added > last[1]:
                last = (now, added)
                first = first or last
            if first is not None and now - last[0] > _QUIET_SECONDS and done(added):
                return Timeline(began, first[0], first[1], last[0], added)
            if now - began > seconds:
                raise ServerError(f"{added} offsets were added to {name} in {seconds:g} s, and it was to be more.")
            time.sleep(_LOOK_SECONDS)

    def judge(self, starts: Mapping[str, Offsets]) -> Delivered:
        """Read what a `read_committed` consumer gets from `starts`, by topic, to the ends as they are now.

        Whoever wrote has ended. Kafka marks a transaction in its partitions after the commit has returned: waited for.
        """

        def marked() -> bool:
            return all(
                self._ends(name, list(of_name)) == self._ends(name, list(of_name), IsolationLevel.READ_UNCOMMITTED)
                for name, of_name in starts.items()
            )

        wait_for(marked, seconds=_ANSWER_SECONDS, what=f"the end of all transactions in {', '.join(starts)}")
        ends = {
            (name, partition): end for name in starts for partition, end in self._ends(name, list(starts[name])).items()
        }
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": "bench-judge",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "queued.max.messages.kbytes": 65536,
            }
        )
        delivered = Delivered()
        left = {(name, partition) for (name, partition), end in ends.items() if starts[name][partition] < end}
        heard = time.monotonic()
        try:
            consumer.assign([TopicPartition(name, partition, starts[name][partition]) for name, partition in left])
            while left:
                for message in consumer.consume(10_000, 0.1):
                    heard = time.monotonic()
                    error = message.error()
                    place = (message.topic() or "", message.partition() or 0)
                    if error is None:
                        delivered.take(message.key(), message.value())
                    elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's local codes are named so
                        raise KafkaException(error)
                    elif (message.offset() or 0) >= ends[place]:
                        left.discard(place)
                if time.monotonic() - heard > _ANSWER_SECONDS:
                    raise ServerError(f"Kafka stopped answering while {', '.join(starts)} was read.")
        finally:
            with contextlib.suppress(RuntimeError):
                consumer.close()
        return delivered


@dataclass(frozen=True, slots=True)
class Timeline:
    """How a topic grew: monotonic times, and offsets added."""

    began: float
    first: float
    first_added: int
    last: float
    added: int

    @property
    def seconds(self) -> float:
        """From the start signal until the last record could be read."""
        return self.last - self.began

    def steady_rate(self, records: int) -> float:
        """Records a second once they flow: the time of starting up is left out, with what was there first.

        Whole time where that is most of it.
        """
        share = 1 - self.first_added / self.added
        if share < 0.3:
            return records / self.seconds
        return records * share / (self.last - self.first)


@dataclass
class Delivered:
    """What a consumer got. `backwards`: records whose version is not newer than one of the same key before it."""

    records: int = 0
    doubled: int = 0
    backwards: int = 0
    last: dict[bytes, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set, repr=False)

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """Take one record in."""
        self.records += 1
        version = int((value or b"").split(b'"version":', 1)[1].split(b",", 1)[0])
        name = key or b""
        if version in self._seen:
            self.doubled += 1
        self._seen.add(version)
        if self.last.get(name, -1) >= version:
            self.backwards += 1
        self.last[name] = max(version, self.last.get(name, -1))
