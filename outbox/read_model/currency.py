"""How current a copy is: whether it has ever been whole, since when it is known to be, and how old it is.

What is known of a topic's end is asked of Kafka; how far the copy is, of the store: another process may apply the other
partitions. A silent topic is no old copy, and a topic whose end nobody can tell is no new one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from outbox.kafka.subscription import Bounds, Place


@dataclass
class Currency:
    """`goal`: the ends that there were at the start, which `ready` means; of each topic once Kafka has told them.

    `loaded_at`, and of each topic `current_at`: as the store has them from before.
    """

    topics: tuple[str, ...]
    loaded_at: dt.datetime | None = None
    current_at: dict[str, dt.datetime] = field(default_factory=dict)
    goal: dict[Place, int] = field(default_factory=dict)
    # Of each topic the ends of an earlier look that are not reached yet: a busy topic is never at its end, and behind
    # its last record lies the mark of a transaction.
    asked: dict[str, tuple[dt.datetime, Mapping[Place, int]]] = field(default_factory=dict)
    behind: dict[str, int] = field(default_factory=dict)
    bounds: Mapping[Place, Bounds] = field(default_factory=dict)
    ready: bool = False

    def saw(
        self,
        bounds: Mapping[Place, Bounds],
        offsets: Mapping[Place, int],
        at: dt.datetime,
        *,
        left_out: Collection[str] = (),
    ) -> bool:
        """Compare how far the store is with what Kafka said after that, both not before `at`; whether it became ready.

        `left_out`: topics that cannot be gone on with, so that what the store has of them says nothing.
        """
        self.bounds = bounds
        for topic in self.topics:
            own = {place: bound for place, bound in bounds.items() if place.topic == topic}
            self.behind[topic] = sum(_left(bound.end, bound, offsets.get(place, 0)) for place, bound in own.items())
            if topic in left_out:
                # It may be another one by that name, with other ends.
                self.goal = {place: end for place, end in self.goal.items() if place.topic != topic}
                self.asked.pop(topic, None)
            elif own:
                ends = {place: bound.end for place, bound in own.items()}
                if not any(place.topic == topic for place in self.goal):
                    self.goal |= ends
                self._came(topic, own, offsets, at, ends)
        was = self.ready
        told = {place.topic for place in self.goal}
        self.ready = was or (told.issuperset(self.topics) and self.reached(self.goal, offsets, bounds))
        if self.ready and self.loaded_at is None:
            self.loaded_at = at
        return self.ready and not was

    def _came(
        self,
        topic: str,
        own: Mapping[Place, Bounds],
        offsets: Mapping[Place, int],
        at: dt.datetime,
        ends: Mapping[Place, int],
    ) -> None:
        """The copy is as new as the topic was at the last look whose ends it has reached."""
        if not self.behind[topic]:
            self.asked[topic] = at, {}
        if topic in self.asked and self.reached(self.asked[topic][1], offsets, own):
            self.current_at[topic] = self.asked.pop(topic)[0]
        if self.behind[topic]:
            self.asked.setdefault(topic, (at, ends))

    @staticmethod
    def reached(goal: Mapping[Place, int], offsets: Mapping[Place, int], bounds: Mapping[Place, Bounds]) -> bool:
        """Whether the store is as far as a goal; of a partition that is empty there is nothing to be read."""
        return all(
            place in bounds and not _left(end, bounds[place], offsets.get(place, 0)) for place, end in goal.items()
        )

    def left(self, offsets: Mapping[Place, int]) -> int:
        """How many offsets are left until it is ready; 0 when it is, or when that is not known."""
        return sum(
            _left(end, self.bounds.get(place, Bounds(0, end)), offsets.get(place, 0))
            for place, end in self.goal.items()
        )

    def staleness(self, now: dt.datetime) -> float | None:
        """How many seconds ago all topics were known to be read to their ends; None: never."""
        if any(topic not in self.current_at for topic in self.topics):
            return None
        return max(0.0, *((now - self.current_at[topic]).total_seconds() for topic in self.topics))


def _left(end: int, bound: Bounds, offset: int) -> int:
    """How many offsets lie before an end. Who is beyond the partition's end has read another one, and all is left."""
    if offset > bound.end:
        return max(1, bound.end - bound.first)
    return max(0, end - max(offset, bound.first))
