"""What can go wrong in a Kafka transaction, in the few kinds that the relay treats differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from confluent_kafka import KafkaError, KafkaException

from outbox.errors import BrokerError, BrokerUnavailableError, OutboxError, TopicError


class Fault(Exception):  # noqa: N818  it is not an error for a person: the relay decides what it means
    """Root of what the relay mends by itself; `code` is librdkafka's name of the error."""

    def __init__(self, error: KafkaError) -> None:
        super().__init__(f"{error.name()}: {error.str()}")
        self.code = error.name()


class Fenced(Fault):
    """The producer is dead: another holder came, or the transaction outlived its time. The position tells which."""


class Refused(Fault):
    """The broker refused a record; every record of its batch failed with it. A fresh producer sends the others.

    Known when the transaction was watched: `culprits` maps the places of refused records, in the order in which they
    were sent, to the reasons; `suspects` are the places of those whose batch was refused and not they themselves. `own`
    is the reason when a record of the outbox's own topics was refused.
    """

    def __init__(
        self,
        error: KafkaError,
        culprits: Mapping[int, str] | None = None,
        suspects: Sequence[int] = (),
        own: str | None = None,
    ) -> None:
        super().__init__(error)
        self.culprits = dict(culprits or {})
        self.suspects = list(suspects)
        self.own = own


class Aborted(Fault):
    """The transaction must be aborted; nothing of it was published. A fresh producer goes on."""


class Unknown(Fault):
    """Whether the transaction was committed is not known. The position tells."""


AWAY = frozenset(
    {
        KafkaError._TIMED_OUT,  # noqa: SLF001  librdkafka's local codes are named so
        KafkaError._TRANSPORT,  # noqa: SLF001  as above
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001  as above
    }
)
"""What a call says while nobody answers: the next may succeed."""

UNSETTLED = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
    }
)
"""What a broker says of a partition whose leader was just chosen: of a topic just made, or after a restart."""

_FENCED = {
    KafkaError._FENCED,  # noqa: SLF001  librdkafka's local codes are named so
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.PRODUCER_FENCED,
}
_REFUSED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.INVALID_MSG,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.POLICY_VIOLATION,
}
_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001  as above
}
NO_TOPIC = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001  as above
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001  as above
    }
)
"""What is said of a topic, or a partition, that is not there."""


def error_of(exception: KafkaException) -> KafkaError:
    """The error that an exception carries."""
    error: KafkaError = exception.args[0]
    return error


def translate(error: KafkaError, *, committing: bool = False) -> Fault | OutboxError:
    """The fault or error for one of librdkafka's; while committing, what is not known to have failed is unknown."""
    code = error.code()
    # Before what is fatal: librdkafka calls them that, too.
    if code in _DENIED:
        return BrokerError(
            f"Kafka denied it: {error.str()}.",
            cure="Check the credentials (the table [kafka] of outbox.toml; of a read model kafka=), and the ACLs of "
            "docs/operations.md (of a read model docs/read-model.md).",
        )
    if code == KafkaError.INVALID_TRANSACTION_TIMEOUT:
        return BrokerError(
            f"Kafka allows no transaction as long as transaction_timeout: {error.str()}.",
            cure="Lower OUTBOX_TRANSACTION_TIMEOUT, or raise the brokers' transaction.max.timeout.ms.",
        )
    if code in _FENCED or error.fatal():
        return Fenced(error)
    if code in _REFUSED:
        return Refused(error)
    if code in NO_TOPIC:
        return TopicError(f"A topic is missing: {error.str()}.", cure="Make it: outbox topics apply.")
    if error.txn_requires_abort():
        return Aborted(error)
    if committing:
        return Unknown(error)
    return unavailable(error)


def unavailable(error: KafkaError | None) -> BrokerUnavailableError:
    """The error for a broker that does not answer."""
    said = f": {error.str()}" if error is not None else ""
    return BrokerUnavailableError(
        f"Kafka does not answer{said}.",
        cure="Check that it runs and that OUTBOX_KAFKA_BOOTSTRAP_SERVERS (of a read model bootstrap=) points at it.",
    )
