"""What all clients of Kafka share: how they are made, properties, logs, and the wait for an answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]  # not in its __all__

from outbox.errors import ConfigError
from outbox.kafka.faults import AWAY, NO_TOPIC, UNSETTLED, error_of

log = logging.getLogger("outbox.kafka")

T = TypeVar("T")

# How long one question may take before it counts as no answer, seconds.
ANSWER_SECONDS = 10.0
# A call into the client is made in slices of this many seconds: a signal is served between two of them.
SLICE_SECONDS = 0.5
# A broker that does not know yet who leads a partition is asked again after so many seconds.
_AGAIN_SECONDS = 0.05


class _Quiet:
    """The client's own log lines, as debug: it repeats "connection refused" several times a second.

    What matters comes out of a call too, and is said once, in words of ours.
    """

    def log(self, _level: int, text: str, *arguments: object) -> None:
        log.debug(text, *arguments)


def make(client: Callable[[dict[str, Any]], T], bootstrap: str, passthrough: Mapping[str, str], **own: Any) -> T:
    """Make a client: the user's properties, and `own` (a dot is written `__`), which they cannot override.

    Raises `ConfigError` for a property that the client does not know or cannot use.
    """
    properties = {
        # A broker that was away is tried again soon; the default backs off to ten seconds.
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        "socket.connection.setup.timeout.ms": 5000,
        "log.connection.close": False,
        **passthrough,
        **{name.replace("__", "."): value for name, value in own.items()},
        "bootstrap.servers": bootstrap,
        "error_cb": _on_error,
        "logger": _Quiet(),
    }
    try:
        return client(properties)
    except KafkaException as exception:
        error = error_of(exception)
        if error.code() not in {KafkaError._INVALID_ARG, KafkaError._INVALID_TYPE}:  # noqa: SLF001  librdkafka's local codes are named so
            raise
        raise ConfigError(
            f"The Kafka client cannot be set up so: {error.str()}.",
            cure="Correct the table [kafka] of outbox.toml, or OUTBOX_KAFKA_BOOTSTRAP_SERVERS (of a read model kafka=, "
            "or bootstrap=).",
        ) from exception


def metadata(
    client: AdminClient | Consumer, topic: str | None = None, *, stop: Callable[[], bool] = lambda: False
) -> ClusterMetadata:
    """The cluster's brokers and topics (or one topic); `KafkaException` when nobody answers, or `stop()` is true."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return (
                client.list_topics(topic, timeout=SLICE_SECONDS) if topic else client.list_topics(timeout=SLICE_SECONDS)
            )
        except KafkaException as exception:
            if error_of(exception).code() not in AWAY or time.monotonic() > deadline or stop():
                raise


def list_offsets(
    admin: AdminClient,
    asked: Mapping[TopicPartition, Any],
    isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
    *,
    there: bool = False,
    deadline: float | None = None,
) -> dict[TopicPartition, Future[Any]]:
    """Of each partition the offset at an `OffsetSpec`, as futures that are done.

    A partition whose leader was just chosen is asked about again until it answers, at most `ANSWER_SECONDS` in all, or
    until `deadline` of `time.monotonic()`. `there`: Kafka has just named the partitions, so that a broker which does
    not know them will soon.
    """
    again = UNSETTLED | NO_TOPIC if there else UNSETTLED
    until = time.monotonic() + ANSWER_SECONDS if deadline is None else deadline
    found: dict[TopicPartition, Future[Any]] = {}
    left = dict(asked)
    while True:
        seconds = max(_AGAIN_SECONDS, until - time.monotonic())
        found.update(admin.list_offsets(left, isolation_level=isolation, request_timeout=seconds))
        left = {place: left[place] for place in left if _is_one_of(again, found[place])}
        if not left or time.monotonic() + _AGAIN_SECONDS > until:
            return found
        time.sleep(_AGAIN_SECONDS)


def _is_one_of(codes: Collection[int], future: Future[Any]) -> bool:
    """Whether it has failed so; waits for it."""
    exception = future.exception()
    return isinstance(exception, KafkaException) and error_of(exception).code() in codes


def _on_error(error: KafkaError) -> None:
    log.debug("%s: %s", error.name(), error.str())
