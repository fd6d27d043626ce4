"""Topics: compare what the entity types declare with what Kafka has, and mend what can be mended."""

from __future__ import annotations

from collections.abc import Iterable

from outbox.config import Config
from outbox.entity_type import EntityType
from outbox.kafka.admin import Admin
from outbox.topic import Action, TopicSpec, dead_letters_topic, declared, plan, positions_topic


def specs(config: Config, *, name: str, shards: int, types: Iterable[EntityType]) -> list[TopicSpec]:
    """The topics of an outbox as they should be."""
    return declared(
        positions_topic(name),
        dead_letters_topic(name),
        types,
        shards=shards,
        replication_factor=config.replication_factor,
    )


def differences(config: Config, wanted: list[TopicSpec]) -> list[Action]:
    """What differs now."""
    with Admin(config.kafka_bootstrap_servers, config.kafka) as admin:
        return plan(wanted, admin.describe([spec.name for spec in wanted]))


def apply(config: Config, actions: Iterable[Action], *, grow: bool = False) -> list[Action]:
    """Do what can be done; what was done. Never deletes; more partitions only with `grow`."""
    done: list[Action] = []
    with Admin(config.kafka_bootstrap_servers, config.kafka) as admin:
        for action in actions:
            spec = action.spec
            match action.kind:
                case "create":
                    admin.create(
                        spec.name,
                        partitions=spec.partitions,
                        replication_factor=spec.replication_factor,
                        settings=spec.settings,
                    )
                case "change":
                    admin.change(spec.name, {name: should for name, (_, should) in action.settings.items()})
                case "grow" if grow:
                    admin.add_partitions(spec.name, spec.partitions)
                case _:
                    continue
            done.append(action)
    return done
