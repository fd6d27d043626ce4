"""A look at the topics, now and then: they may be deleted, or changed, under a relay that runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from outbox.batch import Batch
from outbox.entity_type import EntityType
from outbox.errors import TopicError
from outbox.ports import Log
from outbox.request import DEAD_LETTERS
from outbox.telemetry import emit

log = logging.getLogger("outbox.relay")

# Seconds at the least between two looks because something is too large.
_LIMITS_SECONDS = 3.0


class TopicWatch:
    """What one shard knows of its topics. `interval`: seconds at the most between two looks while entries come.

    `seen` is the version of the entity types that was looked at last.
    """

    def __init__(self, shard: int, *, interval: float) -> None:
        self._shard = shard
        self._interval = interval
        self._troubles: Mapping[str, TopicError] = {}
        self.looked_at = 0.0
        self.seen = 0

    def follow(self, kafka: Log, batch: Batch, *, shards: int, dead: bool) -> None:
        """Look at the topics when they may be others; `dead`: there are dead letters, which a request may mend."""
        if (
            batch.head.types_version != self.seen
            or (dead and any(request.kind in DEAD_LETTERS for request in batch.requests))
            or (batch.entries and time.monotonic() > self.looked_at + self._interval)
            or (self._troubles and not self._troubles.keys().isdisjoint(topics_of(batch) | _asked_for(batch)))
        ):
            self.look(kafka, batch.types, shards=shards, needed=topics_of(batch))
            self.seen = batch.head.types_version

    def look_for_limits(self, kafka: Log, batch: Batch, *, shards: int) -> bool:
        """Look because something is too large, if the last look is not too young; whether it looked.

        The limit may have been raised meanwhile: a verdict that stays needs a look.
        """
        if time.monotonic() <= self.looked_at + _LIMITS_SECONDS:
            return False
        self.look(kafka, batch.types, shards=shards, needed=topics_of(batch))
        return True

    def look(self, kafka: Log, types: Mapping[str, EntityType], *, shards: int, needed: Collection[str] | None) -> None:
        """Refuse topics that must not be published to, among those `needed` (None: all); the others are said once."""
        troubles = kafka.check(types, shards=shards)
        self.looked_at = time.monotonic()
        said, self._troubles = self._troubles, troubles
        for topic, error in troubles.items():
            if needed is None or topic in needed:
                raise error
            if topic not in said:
                emit(log, "relay.topic", shard=self._shard, topic=topic, error=error.message, cure=error.cure)


def _asked_for(batch: Batch) -> set[str]:
    """The topics of the types that requests name: one that was made a moment ago may not have been seen yet."""
    names = {request.arguments.get("type") for request in batch.requests}
    return {of.topic for of in batch.types.values() if of.name in names}


def topics_of(batch: Batch) -> set[str]:
    """The topics that a batch's entries go to."""
    names = {entry[1] for entry in batch.entries}
    return {t.topic for t in batch.types.values() if t.written_as in names}
