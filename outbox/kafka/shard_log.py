"""What one shard of the relay does in Kafka: one transaction a batch, with the position in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from outbox.config import Config
from outbox.dead_letter import DeadLetter, entity_key
from outbox.entity_type import EntityType
from outbox.errors import RelayError, TopicError
from outbox.kafka import reader
from outbox.kafka.admin import Admin
from outbox.kafka.faults import Refused
from outbox.kafka.producer import TransactionalProducer
from outbox.message import Message
from outbox.topic import dead_letters_topic, positions_topic, troubles

# The client's own cap on one record; the topic's limit is what counts, and it is checked before.
_MESSAGE_MAX_BYTES = 200_000_000
_BATCH_SIZE = 1_000_000
_QUEUE_KBYTES = 65_536
_POSITION_KEY = b"position"


def transactional_id(name: str, shard: int) -> str:
    """The transactional id that fences all but one relay of a shard."""
    return f"{name}-{shard}"


class ShardLog:
    """The transactional producer of one shard, and what must be read beside it.

    `check`, then `take`, then the reads, then transactions: `begin`, `send_...`, `send_position`, `commit`. After an
    exception the object is discarded or, after a refusal, renewed. `limits` maps each state topic to its
    `max.message.bytes`; filled by `check`.
    """

    def __init__(self, config: Config, name: str, shard: int, *, stop: Callable[[], bool]) -> None:
        self._config = config
        self._name = name
        self._shard = shard
        self._stop = stop
        self._positions = positions_topic(name)
        self._dead_letters = dead_letters_topic(name)
        self._producer: TransactionalProducer | None = None
        self._batch_size = _BATCH_SIZE
        self._queue_kbytes = _QUEUE_KBYTES
        self._made_for = self._batch_size, self._queue_kbytes
        self.limits: dict[str, int] = {}

    # -- before anything is written ----------------------------------------------------------------------------

    def check(self, types: Mapping[str, EntityType], *, shards: int) -> Mapping[str, TopicError]:
        """Look at all topics; by topic, what is wrong with those of states, and the command that mends it.

        Trouble with the outbox's own topics is raised.
        """
        names = {self._positions, self._dead_letters, *(t.topic for t in types.values())}
        with Admin(self._config.kafka_bootstrap_servers, self._config.kafka, stop=self._stop) as client:
            topics = client.describe(names)
        found = troubles(topics, types, positions=self._positions, dead_letters=self._dead_letters, shards=shards)
        for own in (self._positions, self._dead_letters):
            if own in found:
                raise found[own]
        # Those that must not be published to have none: a request for one ends with that.
        self.limits = {name: topic.max_message_bytes for name, topic in topics.items() if name not in found}
        # A batch is judged as a whole, after compression: it must fit into every topic it may go to.
        batch_size = min([_BATCH_SIZE, *(limit - 1024 for limit in self.limits.values())])
        # The client's memory is bounded, but holds the largest record that there may be, twice.
        queue_kbytes = max(_QUEUE_KBYTES, 2 * max(self.limits.values(), default=0) // 1024)
        self._batch_size, self._queue_kbytes = batch_size, queue_kbytes
        return found

    @property
    def outdated(self) -> bool:
        """Whether `check` has found limits that the producer was not made for: it is to be renewed."""
        return self._producer is not None and self._made_for != (self._batch_size, self._queue_kbytes)

    # -- the producer ------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Fence any other holder of this shard and end what it left open."""
        self._make()

    def _make(self, *, alone: bool = False) -> TransactionalProducer:
        made = self._producer = TransactionalProducer(
            self._config.kafka_bootstrap_servers,
            self._config.kafka,
            transactional_id=transactional_id(self._name, self._shard),
            transaction_timeout_ms=round(self._config.transaction_timeout * 1000),
            batch_size=self._batch_size,
            message_max_bytes=_MESSAGE_MAX_BYTES,
            queue_kbytes=self._queue_kbytes,
            stop=self._stop,
            alone=alone,
        )
        self._made_for = self._batch_size, self._queue_kbytes
        made.init()
        return made

    def probe(self, messages: Sequence[Message]) -> Mapping[int, str]:
        """Find out which of some messages are refused, by their places, and why; `renew` comes after it."""
        self.discard()
        producer = self._make(alone=True)
        producer.begin(watched=True)
        with contextlib.suppress(Refused):
            # One may be refused before the last is sent; which it is is told below.
            self.send_all(messages)
        culprits = producer.probe()
        self.discard()
        return culprits

    def renew(self) -> None:
        """Take a fresh producer: after a refusal the old one's sequence numbers are out of step."""
        self.discard()
        self.take()

    def _open(self) -> TransactionalProducer:
        if self._producer is None:
            # Never by itself: a new producer fences, and its caller must look who was there.
            raise RelayError("The shard is not held; take() comes first.")
        return self._producer

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and neither committed nor aborted."""
        return self._producer is not None and self._producer.in_transaction

    def begin(self, *, watched: bool = False) -> None:
        """Begin a transaction; when it is `watched`, `Refused` names the records that the broker names."""
        self._open().begin(watched=watched)

    def send_all(self, messages: Sequence[Message]) -> None:
        """Send state records; in order for each key."""
        self._open().send_all(messages)

    def send_position(self, value: bytes) -> None:
        """Send the position, to the shard's own partition."""
        self._open().send_to(self._positions, self._shard, _POSITION_KEY, value)

    def send_dead_letter(self, letter: DeadLetter) -> None:
        """Send a dead letter, to the shard's own partition."""
        key = entity_key(letter.type, letter.key)
        self._open().send_to(self._dead_letters, self._shard, key, letter.encode())

    def clear_dead_letter(self, type_name: str, key: str) -> None:
        """Remove an entity's dead letter: a later state supersedes it, or it was dropped."""
        self._open().send_to(self._dead_letters, self._shard, entity_key(type_name, key), None)

    def commit(self) -> None:
        """Commit; the faults of `outbox.kafka.faults` say what else came of it."""
        self._open().commit()

    def discard(self) -> None:
        """Throw the producer away, whatever state it is in."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.discard()

    def close(self) -> None:
        """Abort what is open and close."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    # -- what was committed ------------------------------------------------------------------------------------

    def read_position(self) -> bytes | None:
        """The last committed position of this shard."""
        record = reader.read_last(
            self._config.kafka_bootstrap_servers, self._config.kafka, self._positions, self._shard
        )
        return record.value if record is not None else None

    def unmarked(self) -> int:
        """How many of this shard's positions Kafka has neither committed nor aborted; right after `take`, none."""
        return reader.unmarked(self._config.kafka_bootstrap_servers, self._config.kafka, self._positions, self._shard)

    def read_all_positions(self) -> list[bytes | None]:
        """The last committed position of every shard."""
        return read_positions(self._config, self._name)

    def read_dead_letters(self) -> list[DeadLetter]:
        """The dead letters of this shard."""
        return [letter for letter, _ in read_dead_letters(self._config, self._name, shards=[self._shard])]


def read_positions(config: Config, name: str) -> list[bytes | None]:
    """The last committed position of every shard, by shard; None for one that has none."""
    topic = positions_topic(name)
    servers = (config.kafka_bootstrap_servers, config.kafka)
    found = [reader.read_last(*servers, topic, shard) for shard in range(reader.partition_count(*servers, topic))]
    return [record.value if record is not None else None for record in found]


def read_dead_letters(
    config: Config, name: str, *, shards: Sequence[int] | None = None
) -> list[tuple[DeadLetter, int]]:
    """The dead letters of an outbox (of some shards) with their shards, the oldest first."""
    last: dict[bytes, tuple[bytes | None, int]] = {}
    for record in reader.read_topic(
        config.kafka_bootstrap_servers, config.kafka, dead_letters_topic(name), partitions=shards
    ):
        if record.key is not None:
            last[record.key] = (record.value, record.partition)
    letters = [(DeadLetter.decode(value), shard) for value, shard in last.values() if value is not None]
    return sorted(letters, key=lambda pair: pair[0].at_ms)
