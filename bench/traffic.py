"""The processes beside a relay: a service that writes changes at a steady rate, and a consumer that waits for them.

Each is a process of its own, `python -m bench.traffic ROLE JSON`, so that neither holds the other up, and writes what
it saw into the file `out`: 64-bit integers, in groups; all times are nanoseconds of the monotonic clock, which the
processes of one machine share. The roles:

- `writer` (url, insert, rate, count, connections, places, base, out): number, just before the insert is sent, just
  after its commit has returned. Of all connections, which share the numbers, this process has those at `places`: one
  process of Python does not keep every rate.
- `receiver` (bootstrap, topic, starts, count, patience, out): number, when it was handed over. Says `ready` when it has
  begun to wait.
- `reader` (bootstrap, topic, ends, out): reads the topic from its start to these ends, and does nothing with it; how
  many records there were.
- `transactions` (bootstrap, topic, positions, rate, count, base, out): a bare Kafka transaction of two records for each
  number: just before it is begun, just after its commit has returned.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

_STATE_BYTES = 280


def state(number: int) -> str:
    """The state of a change, JSON of the usual size."""
    begin = f'{{"version":{number},"note":"'
    return begin + (f"{number * 2654435761 % 2**64:016x}" * 20)[: _STATE_BYTES - len(begin) - 2] + '"}'


def paced(first: int, step: int, count: int, rate: float, began: float) -> Iterator[int]:
    """Numbers from `first` by `step`, each when its time has come; late ones at once, so that the rate is kept."""
    for number in range(first, count, step):
        ahead = began + number / rate - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
        yield number


def writer(given: Mapping[str, Any]) -> array[int]:
    """Write changes, each in a transaction of its own, over several connections."""
    connections, rate, count, base = given["connections"], given["rate"], given["count"], given["base"]
    opened = {place: psycopg.connect(given["url"], autocommit=True) for place in given["places"]}
    seen: dict[int, array[int]] = {place: array("q") for place in opened}
    insert = given["insert"].encode()
    began = time.monotonic() + 0.2

    def write(place: int) -> None:
        connection, mine = opened[place], seen[place]
        for number in paced(place, connections, count, rate, began):
            values = (f"k{base + number}", state(base + number))
            before = time.monotonic_ns()
            connection.execute(insert, values, prepare=True)
            mine.extend((base + number, before, time.monotonic_ns()))

    threads = [threading.Thread(target=write, args=(place,)) for place in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in opened.values():
        connection.close()
    return sum(seen.values(), array("q"))


def receiver(given: Mapping[str, Any]) -> array[int]:
    """Wait for records as a consumer that wants each at once."""
    consumer = Consumer(
        {
            "bootstrap.servers": given["bootstrap"],
            "group.id": "bench-receiver",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            # A record is handed over as soon as it is there; a fetch that finds none waits for one at the broker.
            "fetch.min.bytes": 1,
            "fetch.wait.max.ms": 100,
        }
    )
    consumer.assign([TopicPartition(given["topic"], int(p), offset) for p, offset in given["starts"].items()])
    # The first fetches are under way once the client knows the positions.
    consumer.poll(1.0)
    print("ready", flush=True)
    seen, heard, count = array("q"), time.monotonic(), given["count"]
    while len(seen) < 2 * count and time.monotonic() - heard < given["patience"]:
        message = consumer.poll(0.2)
        if message is None:
            continue
        now = time.monotonic_ns()
        if (error := message.error()) is not None:
            if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's local codes are named so
                continue
            raise KafkaException(error)
        heard = now / 1e9
        seen.extend((int((message.key() or b"k0")[1:]), now))
    consumer.close()
    return seen


def reader(given: Mapping[str, Any]) -> array[int]:
    """Read a topic as fast as a bare consumer can."""
    consumer = Consumer(
        {
            "bootstrap.servers": given["bootstrap"],
            "group.id": "bench-reader",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
    left = {int(partition): end for partition, end in given["ends"].items() if end}
    consumer.assign([TopicPartition(given["topic"], partition, OFFSET_BEGINNING) for partition in left])
    count = 0
    while left:
        for message in consumer.consume(10_000, 0.1):
            error = message.error()
            if error is None:
                count += 1
            elif error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's local codes are named so
                raise KafkaException(error)
            elif (message.offset() or 0) >= left.get(message.partition() or 0, 0):
                left.pop(message.partition() or 0, None)
    consumer.close()
    return array("q", (count,))


def transactions(given: Mapping[str, Any]) -> array[int]:
    """Bare Kafka transactions of two records: what no relay can be faster than."""
    producer = Producer(
        {
            "bootstrap.servers": given["bootstrap"],
            "transactional.id": "bench-bare",
            "compression.type": "lz4",
            "linger.ms": 0,
        }
    )
    producer.init_transactions(30)
    seen, base = array("q"), given["base"]
    for number in paced(0, 1, given["count"], given["rate"], time.monotonic() + 0.2):
        before = time.monotonic_ns()
        producer.begin_transaction()
        producer.produce(given["topic"], state(base + number), f"k{base + number}")
        producer.produce(given["positions"], b"p" * 300, b"position")
        producer.commit_transaction(30)
        seen.extend((base + number, before, time.monotonic_ns()))
    return seen


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    roles = {"writer": writer, "receiver": receiver, "transactions": transactions, "reader": reader}
    Path(arguments["out"]).write_bytes(roles[sys.argv[1]](arguments).tobytes())
