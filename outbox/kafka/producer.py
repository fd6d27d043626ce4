"""The transactional producer: thin in the hot loop, and honest about what came of a commit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaException, Producer

from outbox.errors import BrokerUnavailableError
from outbox.kafka.client import ANSWER_SECONDS, SLICE_SECONDS, make
from outbox.kafka.faults import AWAY, error_of, translate, unavailable

# How long a commit that was begun may go on after the relay was asked to stop.
_GRACE = 5.0


class TransactionalProducer:
    """One transactional producer. All sizes in bytes, times as their names say.

    After a fault it is discarded: librdkafka leaves a producer that was fenced, or whose record was refused, in a
    state that the next transaction trips over.
    """

    def __init__(
        self,
        bootstrap: str,
        passthrough: Mapping[str, str],
        *,
        transactional_id: str,
        transaction_timeout_ms: int,
        batch_size: int,
        message_max_bytes: int,
        stop: Callable[[], bool],
    ) -> None:
        self._stop = stop
        self._timeout = transaction_timeout_ms / 1000
        self.in_transaction = False
        self._producer = make(
            Producer,
            bootstrap,
            {
                "linger.ms": "5",
                "compression.type": "lz4",
                "queue.buffering.max.messages": "1000000",
                "queue.buffering.max.kbytes": "65536",
                **passthrough,
            },
            transactional__id=transactional_id,
            transaction__timeout__ms=transaction_timeout_ms,
            acks="all",
            enable__idempotence=True,
            partitioner="murmur2_random",
            batch__size=batch_size,
            message__max__bytes=message_max_bytes,
            # The transaction ends everything; a record's own limit must not be longer than it.
            message__timeout__ms=transaction_timeout_ms,
        )

    def init(self) -> None:
        """Fence any other holder of the id, and end what it left open."""
        deadline = time.monotonic() + max(ANSWER_SECONDS, self._timeout)
        while True:
            try:
                self._producer.init_transactions(SLICE_SECONDS)
            except KafkaException as exception:
                error = error_of(exception)
                again = error.retriable() or error.code() in AWAY
                if not again:
                    raise translate(error) from exception
                if self._stop() or time.monotonic() > deadline:
                    raise unavailable(error) from exception
            else:
                return

    def begin(self) -> None:
        """Begin a transaction."""
        try:
            self._producer.begin_transaction()
        except KafkaException as exception:
            raise translate(error_of(exception)) from exception
        self.in_transaction = True

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        headers: list[tuple[str, str | bytes | None]],
        timestamp_ms: int,
    ) -> None:
        """Send a record, to the partition of its key."""
        while True:
            try:
                self._producer.produce(topic, value, key, headers=headers, timestamp=timestamp_ms)
            except BufferError:
                # Memory is bounded: wait until the broker has taken something.
                self._make_room()
            except KafkaException as exception:
                raise translate(error_of(exception)) from exception
            else:
                return

    def send_to(self, topic: str, partition: int, key: bytes, value: bytes | None) -> None:
        """Send a record of the outbox's own, to a partition that is chosen."""
        try:
            self._producer.produce(topic, value, key, partition)
        except BufferError:
            self._make_room()
            self.send_to(topic, partition, key, value)
        except KafkaException as exception:
            raise translate(error_of(exception)) from exception

    def _make_room(self) -> None:
        deadline = time.monotonic() + self._timeout
        before = len(self._producer)
        while len(self._producer) >= before:
            self._producer.poll(0.05)
            if self._stop() or time.monotonic() > deadline:
                raise unavailable(None)

    def commit(self) -> None:
        """Flush and commit. Raises a fault; after `Unknown` only the position tells what came of it."""
        began = time.monotonic()
        asked = None
        while True:
            try:
                self._producer.commit_transaction(SLICE_SECONDS)
            except KafkaException as exception:
                error = error_of(exception)
                if not (error.retriable() or error.code() in AWAY) or error.fatal():
                    raise translate(error, committing=True) from exception
                now = time.monotonic()
                if asked is None and self._stop():
                    asked = now
                if now - began > self._timeout or (asked is not None and now - asked > _GRACE):
                    raise translate(error, committing=True) from exception
            else:
                self.in_transaction = False
                return

    def abort(self) -> None:
        """Abort, if there is something to abort; a producer that cannot is left to its discarding."""
        if not self.in_transaction:
            return
        self.in_transaction = False
        with contextlib.suppress(KafkaException):
            self._producer.purge()
            self._producer.abort_transaction(_GRACE)

    def discard(self) -> None:
        """Throw it away in whatever state it is; its successor's `init` ends what it left open."""
        with contextlib.suppress(KafkaException):
            self._producer.purge()
        self.in_transaction = False

    def close(self) -> None:
        """Abort what is open and throw it away."""
        with contextlib.suppress(BrokerUnavailableError):
            self.abort()
        self.discard()
