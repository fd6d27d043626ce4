"""Reading a topic to its end, as a `read_committed` consumer sees it.

The end is asked for: the last offsets of a transactional topic are control records, or records of an aborted
transaction, which no consumer ever receives.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka import admin as kafka_admin
from confluent_kafka.admin import AdminClient

from outbox.errors import OutboxError, TopicError
from outbox.kafka.client import ANSWER_SECONDS, list_offsets, make, metadata
from outbox.kafka.faults import Fault, error_of, translate, unavailable

_WINDOW = 200
# confluent_kafka gives these no types.
_SPEC: Any = kafka_admin.OffsetSpec  # type: ignore[attr-defined]  # exported, but not in its __all__
_LATEST = _SPEC.latest()
_EARLIEST = _SPEC.earliest()


class Record(NamedTuple):
    """One record. `timestamp_ms`: milliseconds since 1970; `value` None is a tombstone."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


def read_topic(
    bootstrap: str,
    passthrough: Mapping[str, str],
    topic: str,
    *,
    partitions: Sequence[int] | None = None,
) -> Iterator[Record]:
    """Read a topic (some of its partitions) from the start to the end as it is now.

    Bounded memory: records come as they are fetched. Raises `TopicError` when there is no such topic,
    `BrokerUnavailableError` when Kafka stops answering.
    """
    with _admin(bootstrap, passthrough) as admin:
        there = partitions is None
        chosen = list(partitions) if partitions is not None else _partitions(admin, topic)
        ends = _offsets(admin, topic, chosen, _LATEST, there=there)
        starts = _offsets(admin, topic, chosen, _EARLIEST, there=there)
    yield from _read(bootstrap, passthrough, topic, {p: OFFSET_BEGINNING for p in chosen if starts[p] < ends[p]}, ends)


def read_last(bootstrap: str, passthrough: Mapping[str, str], topic: str, partition: int) -> Record | None:
    """The last committed record of a partition; None when there is none.

    Reads backwards in growing windows: the last offsets may all belong to aborted transactions.
    """
    with _admin(bootstrap, passthrough) as admin:
        end = _offsets(admin, topic, [partition], _LATEST)[partition]
        begin = _offsets(admin, topic, [partition], _EARLIEST)[partition]
    window, upto = _WINDOW, end
    while upto > begin:
        since = max(begin, upto - window)
        last: Record | None = None
        for record in _read(bootstrap, passthrough, topic, {partition: since}, {partition: upto}):
            last = record
        if last is not None:
            return last
        upto, window = since, window * 8
    return None


def bounds(bootstrap: str, passthrough: Mapping[str, str], topic: str) -> tuple[dict[int, int], dict[int, int]]:
    """Of each partition the first offset, and the one below which everything is committed."""
    with _admin(bootstrap, passthrough) as admin:
        partitions = _partitions(admin, topic)
        ends = _offsets(admin, topic, partitions, _LATEST, there=True)
        return _offsets(admin, topic, partitions, _EARLIEST, there=True), ends


def written(bootstrap: str, passthrough: Mapping[str, str], topic: str) -> dict[int, int]:
    """Of each partition the end of what is written, whether or not it is committed."""
    with _admin(bootstrap, passthrough) as admin:
        partitions = _partitions(admin, topic)
        return _offsets(admin, topic, partitions, _LATEST, IsolationLevel.READ_UNCOMMITTED, there=True)


def read_between(
    bootstrap: str, passthrough: Mapping[str, str], topic: str, starts: Mapping[int, int], ends: Mapping[int, int]
) -> Iterator[Record]:
    """Read a topic's partitions from offsets up to offsets; see `bounds`."""
    yield from _read(bootstrap, passthrough, topic, {p: o for p, o in starts.items() if o < ends[p]}, ends)


def unmarked(bootstrap: str, passthrough: Mapping[str, str], topic: str, partition: int) -> int:
    """How many offsets at the end of a partition belong to transactions that are neither committed nor aborted."""
    with _admin(bootstrap, passthrough) as admin:
        stable = _offsets(admin, topic, [partition], _LATEST)[partition]
        written = _offsets(admin, topic, [partition], _LATEST, IsolationLevel.READ_UNCOMMITTED)[partition]
    return written - stable


def partition_count(bootstrap: str, passthrough: Mapping[str, str], topic: str) -> int:
    """How many partitions a topic has."""
    with _admin(bootstrap, passthrough) as admin:
        return len(_partitions(admin, topic))


def _read(
    bootstrap: str,
    passthrough: Mapping[str, str],
    topic: str,
    starts: Mapping[int, int],
    ends: Mapping[int, int],
) -> Iterator[Record]:
    open_partitions = set(starts)
    if not open_partitions:
        return
    consumer = make(
        Consumer,
        bootstrap,
        {"fetch.wait.max.ms": "20", "fetch.error.backoff.ms": "50", **passthrough},
        # Never joined and never committed to; librdkafka wants one.
        group__id=f"outbox-reader-{uuid.uuid4().hex}",
        enable__auto__commit=False,
        auto__offset__reset="error",
        isolation__level="read_committed",
        enable__partition__eof=True,
    )
    try:
        consumer.assign([TopicPartition(topic, p, offset) for p, offset in starts.items()])
        heard = time.monotonic()
        while open_partitions:
            # It waits until it has as many, or so long: short, since the end is near most of the time.
            messages = consumer.consume(1000, 0.02)
            for message in messages:
                partition, offset = message.partition() or 0, message.offset() or 0
                if partition in open_partitions and not _is_end(message) and offset < ends[partition]:
                    yield Record(
                        partition,
                        offset,
                        message.timestamp()[1],
                        message.key(),
                        message.value(),
                        cast("Sequence[tuple[str, bytes]]", message.headers() or ()),
                    )
                # The end of the partition is told at its offset, also where nobody receives the last records.
                if offset >= ends[partition] - (not _is_end(message)):
                    open_partitions.discard(partition)
            if messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > ANSWER_SECONDS:
                raise unavailable(None)
    except KafkaException as exception:
        raise _person(error_of(exception)) from exception
    finally:
        consumer.close()


def _is_end(message: Message) -> bool:
    error = message.error()
    if error is None:
        return False
    if error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001  librdkafka's local codes are named so
        raise _person(error)
    return True


@contextmanager
def _admin(bootstrap: str, passthrough: Mapping[str, str]) -> Iterator[AdminClient]:
    try:
        yield make(AdminClient, bootstrap, passthrough)
    except KafkaException as exception:
        raise _person(error_of(exception)) from exception


def _partitions(admin: AdminClient, topic: str) -> list[int]:
    found = metadata(admin, topic).topics[topic]
    if found.error is not None:
        raise TopicError(f"There is no topic {topic}.", cure="Make it: outbox topics apply.")
    return sorted(found.partitions)


def _offsets(
    admin: AdminClient,
    topic: str,
    partitions: Sequence[int],
    spec: Any,
    isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
    *,
    there: bool = False,
) -> dict[int, int]:
    asked = {TopicPartition(topic, partition): spec for partition in partitions}
    futures = list_offsets(admin, asked, isolation, there=there)
    return {found.partition: future.result().offset for found, future in futures.items()}


def _person(error: KafkaError) -> OutboxError:
    found = translate(error)
    return unavailable(error) if isinstance(found, Fault) else found
