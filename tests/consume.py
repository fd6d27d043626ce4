"""What a consumer sees: the records of a topic, read from the start to its end."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from devstack.kafka import Kafka
from outbox.kafka.reader import Record, read_topic
from workload import Seen


class Live(NamedTuple):
    """A topic as a consumer that starts now gets it: the last value of each key, tombstones left out."""

    values: dict[str, bytes]

    @property
    def json(self) -> dict[str, Any]:
        """The values, read."""
        return {key: orjson.loads(value) for key, value in self.values.items()}


def records(kafka: Kafka, topic: str) -> list[Record]:
    """All records that a `read_committed` consumer gets, partition by partition."""
    return list(read_topic(kafka.bootstrap, {}, topic))


def live(kafka: Kafka, topic: str) -> Live:
    """The last value of each key."""
    last = {record.key: record.value for record in records(kafka, topic)}
    return Live({key.decode(): value for key, value in last.items() if key is not None and value is not None})


def entry_id(record: Record) -> int:
    """The entry id in the record's header."""
    return int(dict(record.headers)["outbox-id"])


def seen(kafka: Kafka, topic: str) -> list[Seen]:
    """The records as the judge wants them: each partition in its order."""
    return [
        Seen(
            entry_id(record),
            (record.key or b"").decode(),
            orjson.loads(record.value)["version"] if record.value is not None else None,
        )
        for record in records(kafka, topic)
    ]
