"""An entity type: a kind of entity, and the topic that carries its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EntityType:
    """One row of the table `entity_types`.

    `topic_settings` holds Kafka's names of the settings that differ from the defaults, and `partitions`.
    `collapse`: of several unpublished entries of one key only the last is published.
    `max_bytes`: the greatest size of a state, uncompressed.
    `source`: the query of all keys and states, or None; see `outbox.source`. `derived`: a captured table has it of its
    capture. `follows`: the entity type whose changes it carries to another topic, or None. `reads_source`: a change is
    published as what the source says of its key, not as the state that was written. `comparison`: when `reconcile`
    takes two states for the same; see `outbox.equality`.
    """

    name: str
    topic: str
    topic_settings: Mapping[str, object] = field(default_factory=dict)
    collapse: bool = True
    max_bytes: int = 1_000_000
    source: str | None = None
    derived: bool = False
    follows: str | None = None
    reads_source: bool = False
    comparison: str | None = None

    @property
    def written_as(self) -> str:
        """The type of the entries that it publishes."""
        return self.follows or self.name
