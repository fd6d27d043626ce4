"""The Kafka edge on a real broker: what comes of a transaction, and what a reader sees of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]  # exported, but not in its __all__

from devstack.kafka import Kafka
from outbox.errors import BrokerUnavailableError, ConfigError, TopicError
from outbox.kafka import reader
from outbox.kafka.admin import Admin
from outbox.kafka.client import list_offsets
from outbox.kafka.faults import Aborted, Fault, Fenced, Refused, Unknown
from outbox.kafka.producer import TransactionalProducer
from outbox.kafka.settings import GUARDED, check_passthrough, is_secret
from relays import eventually

pytestmark = pytest.mark.kafka

FOR_EVER = str(2**63 - 1)


@pytest.fixture
def topic(kafka: Kafka, outbox_name: str) -> str:
    """A compacted topic of one partition that takes records of up to 100,000 bytes."""
    with Admin(kafka.bootstrap, {}) as admin:
        admin.create(
            outbox_name,
            partitions=1,
            replication_factor=1,
            settings={"cleanup.policy": "compact", "max.message.bytes": "100000"},
        )
    return outbox_name


Make = Callable[..., TransactionalProducer]


@pytest.fixture
def producer(kafka: Kafka, outbox_name: str) -> Iterator[Make]:
    """Make producers of one transactional id; each is discarded after the test."""
    made: list[TransactionalProducer] = []

    def make(*, timeout_ms: int = 60_000, stop: Callable[[], bool] = lambda: False) -> TransactionalProducer:
        one = TransactionalProducer(
            kafka.bootstrap,
            {},
            transactional_id=f"{outbox_name}-0",
            transaction_timeout_ms=timeout_ms,
            batch_size=90_000,
            message_max_bytes=200_000_000,
            queue_kbytes=65_536,
            stop=stop,
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.discard()


def publish(producer: TransactionalProducer, topic: str, *values: bytes | None, key: bytes = b"k") -> None:
    """One committed transaction."""
    producer.begin()
    for value in values:
        producer.send_to(topic, 0, key, value)
    producer.commit()


def abort(producer: TransactionalProducer, topic: str, *values: bytes) -> None:
    """One aborted transaction whose records reached the broker."""
    producer.begin()
    for value in values:
        producer.send_to(topic, 0, b"k", value)
    producer._producer.flush(10)
    producer.abort()


def settled(kafka: Kafka, topic: str, expected: list[bytes | None]) -> bool:
    """Whether readers get what was committed.

    A commit is answered when the coordinator has decided; the markers that make it visible follow a few milliseconds
    later.
    """
    return eventually(lambda: values(kafka, topic) == expected, seconds=10, what=f"{expected!r}")


def values(kafka: Kafka, topic: str) -> list[bytes | None]:
    """What a read_committed reader gets."""
    return [record.value for record in reader.read_topic(kafka.bootstrap, {}, topic)]


def last(kafka: Kafka, topic: str) -> bytes | None:
    """The value of the last committed record."""
    record = reader.read_last(kafka.bootstrap, {}, topic, 0)
    return None if record is None else record.value


def test_a_record_arrives_as_it_was_sent(kafka: Kafka, topic: str, producer: Make) -> None:
    """Key, value, headers and time come out; a tombstone is a true null."""
    one = producer()
    one.init()
    one.begin()
    one.send(topic, b"a", b"1", {"outbox-id": b"7", "empty": b"", "nul": b"a\0b", "none": None}, 1_700_000_000_123)
    one.send(topic, b"b", None, {}, 1_700_000_000_124)
    one.commit()
    assert settled(kafka, topic, [b"1", None])
    first, second = reader.read_topic(kafka.bootstrap, {}, topic)
    assert (first.key, first.value) == (b"a", b"1")
    assert list(first.headers) == [("outbox-id", b"7"), ("empty", b""), ("nul", b"a\0b"), ("none", None)]
    assert first.timestamp_ms == 1_700_000_000_123
    assert second.value is None


def test_a_second_holder_fences_the_first(kafka: Kafka, topic: str, producer: Make) -> None:
    """What the first had open is gone, and it learns it at its next commit."""
    first, second = producer(), producer()
    first.init()
    first.begin()
    first.send_to(topic, 0, b"k", b"lost")
    first._producer.flush(10)
    second.init()
    assert last(kafka, topic) is None
    first.send_to(topic, 0, b"k", b"late")
    with pytest.raises(Fenced):
        first.commit()
    first.discard()
    publish(second, topic, b"kept")
    assert settled(kafka, topic, [b"kept"])


def test_an_oversized_record_fails_its_transaction_and_a_fresh_producer_goes_on(
    kafka: Kafka, topic: str, producer: Make
) -> None:
    """The refusal names its code; nothing of the transaction is seen."""
    one = producer()
    one.init()
    one.begin()
    one.send_to(topic, 0, b"innocent", b"1")
    one.send_to(topic, 0, b"k", _incompressible(150_000))
    with pytest.raises(Refused) as refused:
        one.commit()
    assert refused.value.code == "MSG_SIZE_TOO_LARGE"
    one.discard()
    again = producer()
    again.init()
    publish(again, topic, b"2")
    assert settled(kafka, topic, [b"2"])


def test_a_time_far_ahead_is_refused(kafka: Kafka, topic: str, producer: Make) -> None:
    """A topic without a declared limit refuses times more than an hour ahead."""
    one = producer()
    one.init()
    one.begin()
    one.send(topic, b"k", b"1", {}, int(time.time() * 1000) + 2 * 3600 * 1000)
    with pytest.raises(Refused) as refused:
        one.commit()
    assert refused.value.code == "INVALID_TIMESTAMP"


def test_an_aborted_transaction_does_not_end_the_producer(kafka: Kafka, topic: str, producer: Make) -> None:
    """After an abort the same producer commits the next one."""
    one = producer()
    one.init()
    abort(one, topic, b"no")
    publish(one, topic, b"yes")
    assert settled(kafka, topic, [b"yes"])


def test_a_topic_deleted_under_a_transaction_is_reported_and_can_be_left(
    kafka: Kafka, topic: str, producer: Make
) -> None:
    """The commit says so before long, and throwing the producer away does not block."""
    one = producer(timeout_ms=5_000)
    one.init()
    publish(one, topic, b"1")
    client = AdminClient({"bootstrap.servers": kafka.bootstrap})
    client.delete_topics([topic], operation_timeout=10)[topic].result()
    one.begin()
    with pytest.raises((Fault, TopicError)):  # noqa: PT012  whichever of the two calls meets it
        one.send_to(topic, 0, b"k", b"2")
        one.commit()
    began = time.monotonic()
    one.discard()
    assert time.monotonic() - began < 5


def test_a_stop_is_served_while_kafka_is_away(producer: Make, outbox_name: str) -> None:
    """A producer that reaches no broker gives up when it is asked to stop."""
    one = TransactionalProducer(
        "127.0.0.1:1",
        {},
        transactional_id=outbox_name,
        transaction_timeout_ms=60_000,
        batch_size=90_000,
        message_max_bytes=200_000_000,
        queue_kbytes=65_536,
        stop=lambda: True,
    )
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError):
        one.init()
    assert time.monotonic() - began < 5


def test_a_successor_sees_what_was_committed_just_before_it_took_over(kafka: Kafka, topic: str, producer: Make) -> None:
    """`init` waits until the predecessor's commit is visible: only after it is the position the truth."""
    one = producer()
    one.init()
    for n in range(10):
        publish(one, topic, b"%d" % n)
        one.discard()
        one = producer()
        one.init()
        assert last(kafka, topic) == b"%d" % n


def test_the_last_record_is_found_behind_aborted_ones(kafka: Kafka, topic: str, producer: Make) -> None:
    """The last offsets may all belong to aborted transactions: more of them than one window."""
    one = producer()
    one.init()
    assert last(kafka, topic) is None
    abort(one, topic, b"no")
    assert last(kafka, topic) is None
    publish(one, topic, *(b"%d" % n for n in range(500)))
    abort(one, topic, *(b"no" for _ in range(3000)))
    eventually(lambda: last(kafka, topic) == b"499", seconds=10)


def test_an_open_transaction_is_not_read(kafka: Kafka, topic: str, producer: Make) -> None:
    """Readers stop at the last stable offset, and do not wait for it to move."""
    one = producer()
    one.init()
    publish(one, topic, b"1")
    assert settled(kafka, topic, [b"1"])
    one.begin()
    one.send_to(topic, 0, b"k", b"open")
    one._producer.flush(10)
    assert last(kafka, topic) == b"1"
    assert settled(kafka, topic, [b"1"])
    one.commit()
    eventually(lambda: last(kafka, topic) == b"open", seconds=10)


def test_reading_a_missing_topic_says_how_to_make_it(kafka: Kafka, outbox_name: str) -> None:
    """The cure is a command."""
    with pytest.raises(TopicError, match="outbox topics apply"):
        list(reader.read_topic(kafka.bootstrap, {}, f"{outbox_name}-none"))


def test_a_topic_just_made_is_read_although_its_leaders_are_being_chosen(kafka: Kafka, outbox_name: str) -> None:
    with Admin(kafka.bootstrap, {}) as admin:
        for number in range(5):
            name = f"{outbox_name}.{number}"
            admin.create(name, partitions=50, replication_factor=1, settings={"cleanup.policy": "compact"})
            assert list(reader.read_topic(kafka.bootstrap, {}, name)) == []


class Deaf:
    """An admin client of a broker that says some times, of each question anew, what an error's code says."""

    def __init__(self, code: int, times: int) -> None:
        self.asked: list[int] = []
        self._code, self._times = code, times

    def list_offsets(self, asked: dict[TopicPartition, object], **_: object) -> dict[TopicPartition, Future[int]]:
        self.asked.append(len(asked))
        answers: dict[TopicPartition, Future[int]] = {place: Future() for place in asked}
        for place, answer in answers.items():
            if place.partition == 1 and len(self.asked) <= self._times:
                answer.set_exception(KafkaException(KafkaError(self._code)))
            else:
                answer.set_result(7)
        return answers


@pytest.mark.parametrize(
    ("code", "there", "goes_on"),
    [
        (KafkaError.NOT_LEADER_FOR_PARTITION, False, True), (KafkaError.LEADER_NOT_AVAILABLE, True, True),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, True, True), (KafkaError.UNKNOWN_TOPIC_OR_PART, False, False),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, True, False),
    ],
)  # fmt: skip
def test_only_a_partition_whose_leader_is_unsettled_is_asked_about_again(code: int, there: bool, goes_on: bool) -> None:
    """And no other partition with it."""
    admin: Any = Deaf(code, 2)
    places = [TopicPartition("t", 0), TopicPartition("t", 1)]
    found = list_offsets(admin, dict.fromkeys(places), there=there)
    assert admin.asked == ([2, 1, 1] if goes_on else [2])
    assert (found[places[0]].result(), found[places[1]].exception() is None) == (7, goes_on)


def test_asking_for_offsets_ends_at_its_deadline() -> None:
    """However long the leader is missing."""
    admin: Any = Deaf(KafkaError.NOT_LEADER_FOR_PARTITION, 1_000_000)
    place = TopicPartition("t", 1)
    found = list_offsets(admin, {place: None}, deadline=time.monotonic() + 0.2)
    assert isinstance(found[place].exception(), KafkaException)
    assert len(admin.asked) > 1


def test_a_stall_beyond_the_time_limit_fences_without_a_second_holder(kafka: Kafka, topic: str, producer: Make) -> None:
    """Kafka ends a transaction that is older than its limit; a new producer goes on."""
    one = producer(timeout_ms=1_000)
    one.init()
    publish(one, topic, b"1")
    assert settled(kafka, topic, [b"1"])
    one.begin()
    one.send_to(topic, 0, b"k", b"stalled")
    one._producer.flush(10)
    # Kafka looks for such transactions every ten seconds; the last stable offset moves when it has.
    deadline = time.monotonic() + 30
    with Admin(kafka.bootstrap, {}) as _, reader._admin(kafka.bootstrap, {}) as admin:
        latest = reader._offsets(admin, topic, [0], reader._LATEST)[0]
        while reader._offsets(admin, topic, [0], reader._LATEST)[0] == latest:
            assert time.monotonic() < deadline
    with pytest.raises((Fenced, Aborted, Unknown)) as fault:
        one.commit()
    assert isinstance(fault.value, Fenced)
    one.discard()
    again = producer()
    again.init()
    publish(again, topic, b"2")
    assert settled(kafka, topic, [b"1", b"2"])


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_a_property_that_carries_the_guarantee_is_refused(name: str) -> None:
    """The error names the property."""
    with pytest.raises(ConfigError, match=name):
        check_passthrough({name: "1"})


def test_security_passes_through_and_its_secrets_are_known() -> None:
    """TLS and SASL are the user's; what must not be shown is known by name."""
    check_passthrough({"security.protocol": "SASL_SSL", "sasl.password": "x", "ssl.key.pem": "y"})
    assert is_secret("sasl.password")
    assert is_secret("ssl.key.pem")
    assert is_secret("sasl.oauthbearer.client.secret")
    assert not is_secret("security.protocol")


def test_without_the_extra_the_error_says_what_to_install() -> None:
    """A base install has no Kafka client; what needs one names the extra."""
    code = (
        "import sys; sys.modules['confluent_kafka'] = None\n"
        "from outbox_cli.main import main\n"
        "sys.argv = ['outbox', '--database-url', 'postgresql://x@127.0.0.1/x', 'topics', 'plan']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "pip install '.[relay]'" in done.stderr, done.stderr


def _incompressible(size: int) -> bytes:
    import random

    return random.Random(1).randbytes(size)


def test_a_producer_that_is_discarded_leaves_no_transaction_open(kafka: Kafka, topic: str, producer: Make) -> None:
    """Aborted, not dropped: librdkafka may end the process when it is destroyed while it registers partitions."""
    first = producer(timeout_ms=900_000)
    first.init()
    first.begin()
    first.send_to(topic, 0, b"k", b"v")
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})

    def end(level: IsolationLevel) -> int:
        where = TopicPartition(topic, 0)
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # so it is in the client
        found = admin.list_offsets({where: latest}, isolation_level=level)
        return int(found[where].result().offset)

    eventually(lambda: end(IsolationLevel.READ_UNCOMMITTED) > end(IsolationLevel.READ_COMMITTED), what="it is open")
    first.discard()
    eventually(lambda: end(IsolationLevel.READ_UNCOMMITTED) == end(IsolationLevel.READ_COMMITTED), what="it is ended")
    assert values(kafka, topic) == []
