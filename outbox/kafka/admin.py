"""Topics as Kafka has them: look, make, change; never delete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not in its __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from outbox.errors import ConfigError, TopicError
from outbox.kafka.client import ANSWER_SECONDS, make, metadata
from outbox.kafka.faults import Fault, error_of, translate, unavailable
from outbox.topic import TopicState


class Admin:
    """A client that describes and changes topics. Raises the errors of `outbox.errors`."""

    def __init__(
        self, bootstrap: str, passthrough: Mapping[str, str], *, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._stop = stop
        self._client = make(AdminClient, bootstrap, passthrough)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.poll(0)

    def brokers(self) -> int:
        """How many brokers the cluster has."""
        with _translated():
            return len(metadata(self._client, stop=self._stop).brokers)

    def describe(self, names: Collection[str]) -> dict[str, TopicState]:
        """Those of the topics that exist."""
        with _translated():
            # Asking for all does not make one that is missing, whatever the broker's settings.
            topics = metadata(self._client, stop=self._stop).topics
            there = [name for name in names if name in topics and topics[name].error is None]
            if not there:
                return {}
            futures = self._client.describe_configs(
                [ConfigResource(ResourceType.TOPIC, name) for name in there], request_timeout=ANSWER_SECONDS
            )
            configs = {resource.name: future.result() for resource, future in futures.items()}
        return {
            name: TopicState(
                name=name,
                partitions=len(topics[name].partitions),
                replication_factor=min((len(p.replicas) for p in topics[name].partitions.values()), default=0),
                settings={key: entry.value for key, entry in configs[name].items() if entry.value is not None},
            )
            for name in there
        }

    def create(self, name: str, *, partitions: int, replication_factor: int, settings: Mapping[str, str]) -> None:
        """Make a topic; one that somebody made meanwhile is left as it is."""
        topic = NewTopic(name, num_partitions=partitions, replication_factor=replication_factor, config=dict(settings))
        with _translated():
            futures = self._client.create_topics([topic], operation_timeout=ANSWER_SECONDS)
            try:
                futures[name].result()
            except KafkaException as exception:
                error = error_of(exception)
                if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    return
                if error.code() == KafkaError.INVALID_REPLICATION_FACTOR:
                    raise ConfigError(
                        f"The topic {name} cannot have {replication_factor} replicas: {error.str()}.",
                        cure="Start more brokers, or set OUTBOX_REPLICATION_FACTOR (1 on a development machine).",
                    ) from exception
                if error.code() in {KafkaError.INVALID_CONFIG, KafkaError.POLICY_VIOLATION}:
                    raise ConfigError(
                        f"Kafka refuses the settings of the topic {name}: {error.str()}.",
                        cure="Correct them: outbox types change TYPE --topic-setting NAME=VALUE.",
                    ) from exception
                raise

    def change(self, name: str, settings: Mapping[str, str]) -> None:
        """Change some settings of a topic; the others stay."""
        resource = ConfigResource(
            ResourceType.TOPIC,
            name,
            incremental_configs=[
                ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in settings.items()
            ],
        )
        with _translated():
            futures = self._client.incremental_alter_configs([resource], request_timeout=ANSWER_SECONDS)
            try:
                futures[resource].result()
            except KafkaException as exception:
                if error_of(exception).code() == KafkaError.INVALID_CONFIG:
                    raise ConfigError(
                        f"Kafka refuses the settings of the topic {name}: {error_of(exception).str()}.",
                        cure="Correct them: outbox types change TYPE --topic-setting NAME=VALUE.",
                    ) from exception
                raise

    def add_partitions(self, name: str, count: int) -> None:
        """Raise the number of partitions to `count`."""
        with _translated():
            self._client.create_partitions([NewPartitions(name, count)], request_timeout=ANSWER_SECONDS)[name].result()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except KafkaException as exception:
        error = error_of(exception)
        if error.code() == KafkaError.INVALID_REPLICATION_FACTOR:
            raise TopicError(str(error.str())) from exception
        found = translate(error)
        raise (unavailable(error) if isinstance(found, Fault) else found) from exception
