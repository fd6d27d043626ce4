"""A batch: what one read of the outbox brought, and the position that follows it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.lineage import Head
from outbox.message import Made
from outbox.position import Point, Position
from outbox.request import Found, Request, Row


@dataclass(frozen=True, slots=True)
class Batch:
    """What one read brought, all as of one snapshot.

    `entries` in id order; `last_id` is None when the read reached the point that it goes to, else the id where it was
    cut. `types` are the entity types, by name. `requests` are open requests of the control table, and `found` what was
    read for them. `live`: of each type that reads its source, what that says of the keys that the entries name, with
    the id of the last entry of each, in id order. `made`: what the entries became, where that was done with the read.
    `seconds`: how long the read took.
    """

    position: Position
    head: Head
    types: Mapping[str, EntityType]
    entries: Sequence[Entry]
    last_id: int | None
    requests: Sequence[Request] = ()
    found: Found = field(default_factory=Found)
    live: Sequence[Row] = ()
    made: Made | None = field(default=None, compare=False)
    seconds: float = 0.0

    @property
    def cut(self) -> bool:
        """Whether more of the same difference is to be read."""
        return self.last_id is not None

    @property
    def to(self) -> Point:
        """The point that this difference goes to: the cut's, or what this batch's own snapshot sees."""
        cut = self.position.cut
        return cut.to if cut else self.head.point

    @property
    def takes_requests(self) -> bool:
        """Whether requests may be done with it.

        What they publish is read in the batch's own snapshot. A cut backlog ends at an older one: what follows it
        would be older than what was published for them.
        """
        return self.last_id is None and self.position.cut is None

    @property
    def progress(self) -> dict[str, Mapping[str, Any]]:
        """What the position says of requests, but for those that the control table knows to be over."""
        progress = dict(self.position.requests)
        if self.takes_requests:
            waiting = {str(request.id) for request in self.requests}
            progress = {number: said for number, said in progress.items() if number in waiting}
        return progress

    def next(self) -> Position:
        """The position once this batch is published."""
        return self.position.advanced(self.to, self.last_id)
