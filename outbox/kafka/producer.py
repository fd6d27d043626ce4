"""The transactional producer: thin in the hot loop, and honest about what came of a commit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Delivered

from outbox.errors import ConfigError
from outbox.kafka.client import ANSWER_SECONDS, SLICE_SECONDS, make
from outbox.kafka.faults import AWAY, Refused, error_of, translate, unavailable
from outbox.message import Headers, Message

# How long a commit that was begun may go on after the relay was asked to stop.
_GRACE = 5.0
_BATCH_MESSAGES = 10_000  # librdkafka's default
# How long to wait for room in the client's queue before asking again.
_ROOM_SECONDS = 0.01


class TransactionalProducer:
    """One transactional producer. All sizes in bytes, times as their names say; `alone`: each record a batch.

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
        queue_kbytes: int,
        stop: Callable[[], bool],
        alone: bool = False,
    ) -> None:
        self._stop = stop
        self._timeout = transaction_timeout_ms / 1000
        self.in_transaction = False
        self._watched = False
        self._producer = make(
            Producer,
            bootstrap,
            {
                "linger.ms": "5",
                "compression.type": "lz4",
                "queue.buffering.max.messages": "1000000",
                "queue.buffering.max.kbytes": str(queue_kbytes),
                **passthrough,
            },
            transactional__id=transactional_id,
            transaction__timeout__ms=transaction_timeout_ms,
            acks="all",
            enable__idempotence=True,
            partitioner="murmur2_random",
            batch__size=batch_size,
            message__max__bytes=message_max_bytes,
            batch__num__messages=1 if alone else _BATCH_MESSAGES,
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

    def begin(self, *, watched: bool = False) -> None:
        """Begin a transaction; when it is `watched`, `Refused` names the records that the broker names."""
        try:
            self._producer.begin_transaction()
        except KafkaException as exception:
            raise translate(error_of(exception)) from exception
        self.in_transaction = True
        self._watched = watched
        self._sent = 0
        self._accused: list[tuple[int, tuple[str | None, int | None], str]] = []
        self._named: set[tuple[str | None, int | None]] = set()
        self._own_culprit: str | None = None

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        headers: Headers,
        timestamp_ms: int,
    ) -> None:
        """Send a record, to the partition of its key."""
        more: dict[str, Any] = {}
        if self._watched:
            more["on_delivery"] = partial(self._delivered, self._sent)
            self._sent += 1
        self._produce(topic, value, key, headers=headers, timestamp=timestamp_ms, **more)

    def _produce(self, *record: Any, **more: Any) -> None:
        """Hand a record to the client, as soon as it has room for it."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                self._producer.produce(*record, **more)
            except BufferError:
                # Memory is bounded: wait until the broker has taken something.
                self._make_room(deadline)
            except KafkaException as exception:
                error = error_of(exception)
                break
            else:
                return
        self._fail(error)

    def _fail(self, error: KafkaError) -> NoReturn:
        """Raise what an error means that a record met; not while it is handled, see `commit`."""
        if error.code() == KafkaError._STATE:  # noqa: SLF001  librdkafka's local codes are named so
            # The transaction has failed before, with what was sent: its commit, which cannot succeed, says of what.
            self.commit()
        raise translate(error)

    def send_all(self, messages: Sequence[Message]) -> None:
        """Send state records, in their order: `send` for each, with no step more than needed while nothing is wrong."""
        if self._watched:
            for topic, key, value, headers, created_ms, _ in messages:
                self.send(topic, key, value, headers, created_ms)
            return
        produce = self._producer.produce
        for topic, key, value, headers, created_ms, _ in messages:
            try:
                # By place, not by name, which would take half as long again: partition (the partitioner's choice), two
                # callbacks, time, headers.
                produce(topic, value, key, -1, None, None, created_ms, headers)
            except BufferError:
                self.send(topic, key, value, headers, created_ms)
            except KafkaException as exception:
                error = error_of(exception)
                break
        else:
            return
        self._fail(error)

    def send_to(self, topic: str, partition: int, key: bytes, value: bytes | None) -> None:
        """Send a record of the outbox's own, to a partition that is chosen."""
        more: dict[str, Any] = {"on_delivery": partial(self._delivered, None)} if self._watched else {}
        self._produce(topic, value, key, partition, **more)

    def _delivered(self, place: int | None, error: KafkaError | None, message: Delivered) -> None:
        if error is None:
            return
        where = (message.topic(), message.partition())
        if error.code() == KafkaError._INVALID_DIFFERENT_RECORD:  # noqa: SLF001  librdkafka's local codes are named so
            self._named.add(where)
        elif isinstance(translate(error), Refused):
            if place is None:
                self._own_culprit = error.str()
            else:
                self._accused.append((place, where, f"{error.name()}: {error.str()}"))

    def probe(self) -> dict[int, str]:
        """Send what was sent, one record a batch, until one is refused; the places and reasons. Commits nothing."""
        deadline = time.monotonic() + self._timeout
        while not self._accused and len(self._producer) and time.monotonic() < deadline and not self._stop():
            self._producer.poll(SLICE_SECONDS / 10)
        self.abort()
        return {place: reason for place, _, reason in self._accused}

    def _make_room(self, deadline: float) -> None:
        if not len(self._producer):
            raise ConfigError(
                "A record is larger than all that the Kafka client may hold (queue.buffering.max.kbytes).",
                cure="Raise or remove queue.buffering.max.kbytes in the table [kafka] of outbox.toml.",
            )
        # Not until there is room, which of a transaction that has failed meanwhile there never is.
        self._producer.poll(_ROOM_SECONDS)
        if self._stop() or time.monotonic() > deadline:
            raise unavailable(None)

    def commit(self) -> None:
        """Flush and commit. Raises a fault; after `Unknown` only the position tells what came of it.

        It is raised with no exception behind it: that would hold the client, and its threads, in a ring of frames.
        """
        began = time.monotonic()
        asked = None
        while True:
            try:
                if self._watched:
                    # The reports of what was delivered are handed over in here.
                    self._producer.flush(SLICE_SECONDS)
                self._producer.commit_transaction(SLICE_SECONDS)
            except KafkaException as exception:
                error = error_of(exception)
            else:
                self.in_transaction = False
                return
            if not (error.retriable() or error.code() in AWAY) or error.fatal():
                raise self._judged(error)
            now = time.monotonic()
            if asked is None and self._stop():
                asked = now
            if now - began > self._timeout or (asked is not None and now - asked > _GRACE):
                raise translate(error, committing=True)

    def _judged(self, error: KafkaError) -> Exception:
        fault = translate(error, committing=True)
        if not isinstance(fault, Refused):
            return fault
        # The client tells records of a batch apart when several are refused; of one, all bear the batch's error.
        culprits = {place: reason for place, where, reason in self._accused if where in self._named}
        suspects = [place for place, where, _ in self._accused if where not in self._named]
        return Refused(error, culprits, suspects, self._own_culprit)

    def abort(self, seconds: float = _GRACE) -> None:
        """Abort, if there is something to abort; a producer that cannot is left to its discarding."""
        if not self.in_transaction:
            return
        self.in_transaction = False
        with contextlib.suppress(KafkaException):
            self._producer.purge()
            self._producer.abort_transaction(seconds)

    def discard(self) -> None:
        """Throw it away in whatever state it is; its successor's `init` ends what it left open.

        An open transaction is aborted, or at least begun to be: librdkafka ends the whole process (an assertion,
        `txn_req_cnt > 0`) when a producer is destroyed in the moment in which it registers partitions for its
        transaction, and it registers none once the abort has begun.
        """
        self.abort(SLICE_SECONDS)
        with contextlib.suppress(KafkaException):
            self._producer.purge()
            # What is reported holds this object, and with it the client, for as long as nobody takes the report.
            self._producer.poll(0)

    def close(self) -> None:
        """Abort what is open and throw it away."""
        self.abort()
        self.discard()
