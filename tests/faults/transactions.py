"""What a broker holds of transactions: seen from outside, by comparing what consumers of both kinds may read."""

from __future__ import annotations

import time
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka import admin as kafka_admin
from confluent_kafka.admin import AdminClient

# confluent_kafka gives it no type.
_LATEST: Any = kafka_admin.OffsetSpec.latest()  # type: ignore[attr-defined, no-untyped-call]  # exported, but not in its __all__
_SECONDS = 30


def ends(admin: AdminClient, topic: str, *, committed: bool) -> dict[int, int]:
    """By partition, where the topic ends for a reader; one of what is committed stops at the first open transaction."""
    partitions = admin.list_topics(topic, timeout=_SECONDS).topics[topic].partitions
    level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    asked = admin.list_offsets({TopicPartition(topic, p): _LATEST for p in partitions}, isolation_level=level)
    return {partition.partition: future.result(_SECONDS).offset for partition, future in asked.items()}


def has_open_transaction(admin: AdminClient, topic: str) -> bool:
    """Whether a transaction is open in the topic."""
    # In this order: one that ends in between only seems to be open, and is not on the next look.
    return ends(admin, topic, committed=True) != ends(admin, topic, committed=False)


def offsets(admin: AdminClient, bootstrap: str, topic: str, *, committed: bool) -> set[tuple[int, int]]:
    """Partition and offset of every record up to the end; those of aborted transactions unless `committed`."""
    left = {partition: end for partition, end in ends(admin, topic, committed=committed).items() if end > 0}
    found: set[tuple[int, int]] = set()
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "faults",
            "enable.auto.commit": False,
            "isolation.level": "read_committed" if committed else "read_uncommitted",
            "enable.partition.eof": True,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in left])
        deadline = time.monotonic() + _SECONDS
        while left:
            assert time.monotonic() < deadline, f"{topic} cannot be read to its end"
            for message in consumer.consume(1000, 0.05):
                partition, offset = message.partition(), message.offset()
                assert partition is not None
                assert offset is not None
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:  # librdkafka's codes are named so
                    raise KafkaException(error)
                end = left.get(partition, 0)
                if error is None and offset < end:
                    found.add((partition, offset))
                # Somebody may go on writing: then the end as it was is only passed by.
                if offset >= end - (error is None):
                    left.pop(partition, None)
    finally:
        consumer.close()
    return found
