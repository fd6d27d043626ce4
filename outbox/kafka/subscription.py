"""A subscription: records of topics as a `read_committed` consumer gets them, from places that its user knows.

Kafka's group says who reads which partition; where reading begins, the user says each time. What it says of a partition
is, beside its records, how far it is read: the last offsets of a transactional topic are control records, or records of
aborted transactions, which no consumer ever receives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import admin as kafka_admin
from confluent_kafka.admin import AdminClient

from outbox.errors import BrokerError, ConfigError, OutboxError, TopicError
from outbox.kafka.client import ANSWER_SECONDS, list_offsets, log, make, metadata
from outbox.kafka.faults import AWAY, NO_TOPIC, Fault, error_of, translate, unavailable
from outbox.kafka.reader import Record

_SPEC: Any = kafka_admin.OffsetSpec  # type: ignore[attr-defined]  # exported, but not in its __all__
_ASKED: Mapping[str, Any] = {"first": _SPEC.earliest(), "end": _SPEC.latest()}
# What a client says that goes on no more: another one of its name is there.
_DEAD = {
    KafkaError._FATAL,  # noqa: SLF001  librdkafka's local codes are named so
    KafkaError.FENCED_INSTANCE_ID,
}

# How long the client is waited for to tell that its places are not its own any more, before it joins again.
_LEAVE_SECONDS = 2.0

_STORE = "the store says from where reading goes on"
_ASSIGNED = "partitions are assigned by hand, all at once, which other protocols do not allow"
GUARDED: Mapping[str, str] = {
    "group.id": "it is the read model's name",
    "group.instance.id": "set instance= instead",
    "bootstrap.servers": "set bootstrap= instead",
    "metadata.broker.list": "set bootstrap= instead",
    "isolation.level": "what is not committed must not be read",
    "auto.offset.reset": _STORE,
    "enable.auto.commit": _STORE,
    "auto.commit.enable": _STORE,
    "enable.auto.offset.store": _STORE,
    "enable.partition.eof": "it says that a topic is read to its end",
    "allow.auto.create.topics": "a topic is its owner's to make",
    "group.protocol": _ASSIGNED,
    "group.remote.assignor": _ASSIGNED,
    "default.topic.config": "it hides other properties",
}
"""Properties that a read model sets itself, and why."""


def check_passthrough(properties: Mapping[str, str]) -> None:
    """Refuse a property that would weaken what a read model guarantees; `ConfigError` with the reason."""
    for name, value in properties.items():
        reason = GUARDED.get(name)
        if name == "partition.assignment.strategy" and "cooperative" in value:
            reason = _ASSIGNED
        if name.endswith("_cb") or name.startswith("plugin."):
            reason = "it names code"
        if reason is not None:
            raise ConfigError(f"The property {name} in kafka= cannot be set: {reason}.", cure="Leave it out.")


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


class Bounds(NamedTuple):
    """Of a partition the first offset that there is, and the one below which everything is committed."""

    first: int
    end: int


class _There(dict[Place, Bounds]):
    """The bounds of the places that there are; who takes one that there is not is told so."""

    def __missing__(self, place: Place) -> Bounds:
        raise TopicError(
            f"There is no partition {place.partition} of a topic {place.topic}.",
            cure="Its owner makes it: outbox topics apply.",
        )


@dataclass
class Fetched:
    """What came: records, in order for each place, and up to which offset each place is read now.

    `since`: the offset behind the last record that came before, or where reading began; between it and the first record
    there is nothing.
    """

    records: dict[Place, list[Record]] = field(default_factory=dict)
    reached: dict[Place, int] = field(default_factory=dict)
    since: Mapping[Place, int] = field(default_factory=dict)
    assigned: Sequence[Place] | None = None
    """The places that the group has given, when that has changed: they are read once `begin` says from where."""

    def __len__(self) -> int:
        """How many records."""
        return sum(map(len, self.records.values()))


class Subscription:
    """A consumer of topics, which reads what `begin` names.

    With a `group` it shares the partitions with the others of it, and is told which are its own (`Fetched.assigned`).
    Raises the errors of `outbox.errors`. Not for several threads at once.
    """

    def __init__(
        self,
        bootstrap: str,
        passthrough: Mapping[str, str],
        topics: Sequence[str],
        *,
        group: str | None,
        instance: str | None = None,
    ) -> None:
        """`instance`: the name of this member, the same at each of its starts (`group.instance.id`)."""
        self._topics = list(topics)
        self._group = group
        self._instance = instance
        named = {} if instance is None else {"group.instance.id": instance}
        with self._translated():
            self._admin = make(AdminClient, bootstrap, passthrough)
            self._consumer = make(
                Consumer,
                bootstrap,
                {
                    "fetch.wait.max.ms": "100",
                    "fetch.error.backoff.ms": "100",
                    # A new partition holds keys that another one had.
                    "topic.metadata.refresh.interval.ms": "10000",
                    "session.timeout.ms": "10000",
                    # What is fetched ahead: a few batches. With the client's 64 MB, and 100,000 messages of each
                    # partition, its own bookkeeping took some hundred MB more.
                    "queued.min.messages": "20000",
                    "queued.max.messages.kbytes": "16384",
                    **passthrough,
                    **named,
                },
                group__id=group or "outbox-read-model",
                enable__auto__commit=False,
                enable__auto__offset__store=False,
                auto__offset__reset="error",
                isolation__level="read_committed",
                enable__partition__eof=True,
                # A topic that is missing is said, not made.
                allow__auto__create__topics=False,
            )
            self._given: Sequence[Place] | None = None
            # Of each place that it reads the offset behind the last record that it gave.
            self._next: dict[Place, int] = {}
            self._failed: KafkaException | None = None
            if group is not None:
                self._subscribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group; the others get the partitions at once."""
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # From where is not known yet: nothing is fetched until `begin`.
        consumer.assign([])
        self._next.clear()
        self._given = [Place(one.topic, one.partition) for one in partitions]

    def _on_revoke(self, consumer: Consumer, _partitions: list[TopicPartition]) -> None:
        consumer.unassign()
        self._next.clear()
        self._given = []

    @property
    def reads(self) -> frozenset[Place]:
        """The places that it reads."""
        return frozenset(self._next)

    def begin(self, offsets: Mapping[Place, int]) -> None:
        """Read these places, and no others, from these offsets; 0 is the first that there is."""
        if self._given is not None:
            return  # the group has said something else since: the next fetch tells it
        with self._translated():
            self._consumer.assign(
                [
                    TopicPartition(place.topic, place.partition, offset or OFFSET_BEGINNING)
                    for place, offset in offsets.items()
                ]
            )
        self._next = dict(offsets)

    def rejoin(self) -> None:
        """Leave the group and join it again: it says anew which places are this member's."""
        with self._translated():
            self._given = None
            self._consumer.unsubscribe()
            self._next.clear()
            # The client takes note that it left: one that is closed before that aborts the whole process.
            until = time.monotonic() + _LEAVE_SECONDS
            while self._given is None and time.monotonic() < until:
                if (message := self._consumer.poll(0.02)) is not None:
                    self._take([message], Fetched())
            self._given = None
            self._subscribe()

    def _subscribe(self) -> None:
        self._consumer.subscribe(
            self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    def fetch(self, most: int, seconds: float) -> Fetched:
        """Wait at most so long for the first record; with it come those that are here already, at most so many.

        An error that came after records is raised by the next call: they would be lost.
        """
        failed, self._failed = self._failed, None
        fetched = Fetched(since=dict(self._next))
        with self._translated():
            if failed is not None:
                raise failed
            messages: list[Message] = []
            try:
                if (first := self._consumer.poll(seconds)) is not None:
                    messages.append(first)
                    messages += self._consumer.consume(most, 0)
            except KafkaException as exception:
                self._failed = exception
            self._take(messages, fetched)
            if self._failed is not None and not fetched.reached:
                failed, self._failed = self._failed, None
                raise failed
        # After what it may have interrupted: what was fetched before it is not this reader's any more.
        if self._given is not None:
            fetched = Fetched(assigned=self._given)
            self._given = None
        return fetched

    def _take(self, messages: Iterable[Message], fetched: Fetched) -> None:
        """Take what came, in its order."""
        records, reached, own = fetched.records, fetched.reached, self._next
        places: dict[tuple[str | None, int | None], Place] = {}
        for message in messages:
            where = message.topic(), message.partition()
            place = places.get(where)
            if place is None:
                place = places[where] = Place(where[0] or "", where[1] or 0)
            offset = message.offset() or 0
            if (error := message.error()) is not None:
                self._take_error(error, place, offset, fetched)
            elif place in own:  # not of before a rebalance
                if place not in records:
                    records[place] = []
                headers = cast("Sequence[tuple[str, bytes]]", message.headers() or ())
                records[place].append(
                    Record(place.partition, offset, message.timestamp()[1], message.key(), message.value(), headers)
                )
                own[place] = reached[place] = offset + 1

    def _take_error(self, error: KafkaError, place: Place, offset: int, fetched: Fetched) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:  # noqa: SLF001  librdkafka's local codes are named so
            if place in self._next:
                fetched.reached[place] = offset
        elif code == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001  as above
            # What it was to read is gone: whoever says from where to begin looks at the bounds again.
            self._given = sorted(self._next)
        elif code in AWAY or code in NO_TOPIC or error.retriable():
            # `places` says which topics there are; the others go on.
            log.debug("%s: %s", error.name(), error.str())
        else:
            self._failed = KafkaException(error)

    def report(self, offsets: Mapping[Place, int]) -> None:
        """Tell the group how far places are, for those who watch it; nothing depends on it, and it may fail."""
        try:
            self._consumer.commit(
                offsets=[TopicPartition(place.topic, place.partition, offset) for place, offset in offsets.items()],
                asynchronous=True,
            )
        except KafkaException as exception:
            log.debug("offsets are not told: %s", error_of(exception).str())

    def places(self) -> list[Place]:
        """All partitions of those of the topics that there are."""
        with self._translated():
            topics = metadata(self._admin).topics
        there = [name for name in self._topics if name in topics and topics[name].error is None]
        return [Place(name, partition) for name in there for partition in sorted(topics[name].partitions)]

    def bounds(self, places: Iterable[Place]) -> dict[Place, Bounds]:
        """Where those of these places that there are begin and end now; taking another one raises `TopicError`."""
        there = [TopicPartition(place.topic, place.partition) for place in places]
        found: dict[str, dict[Place, int]] = {}
        if not there:
            return _There()
        deadline = time.monotonic() + ANSWER_SECONDS
        with self._translated():
            for name, spec in _ASKED.items():
                futures = list_offsets(self._admin, dict.fromkeys(there, spec), deadline=deadline)
                found[name] = {
                    Place(one.topic, one.partition): result.offset for one, result in _results(futures).items()
                }
        first, end = found["first"], found["end"]
        return _There({place: Bounds(first[place], end[place]) for place in first.keys() & end.keys()})

    def identities(self) -> dict[str, str]:
        """Of each topic that there is its id: one that was deleted and made again has another."""
        with self._translated():
            futures = self._admin.describe_topics(TopicCollection(self._topics), request_timeout=ANSWER_SECONDS)
            return {name: str(result.topic_id) for name, result in _results(futures).items()}

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the client's errors into those of `outbox.errors`."""
        try:
            yield
        except KafkaException as exception:
            raise self._person(error_of(exception)) from exception

    def _person(self, error: KafkaError) -> OutboxError:
        if error.code() in _DEAD or error.fatal():
            named = f'with the instance name "{self._instance}" ' if self._instance is not None else ""
            return BrokerError(
                f"Another process {named}has taken this one's place in the group {self._group}: {error.str()}.",
                cure="Give each process an instance= of its own, or none.",
            )
        found = translate(error)
        return unavailable(error) if isinstance(found, Fault) else found


def _results(futures: Mapping[Any, Any]) -> dict[Any, Any]:
    """What was answered, but of topics that are not there."""
    found = {}
    for asked, future in futures.items():
        try:
            found[asked] = future.result()
        except KafkaException as exception:
            if error_of(exception).code() not in NO_TOPIC:
                raise
    return found
