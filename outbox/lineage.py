"""Lineage: whether a database continues the log that a position describes.

Pure decisions; the reader brings what the database says, the relay does what is decided.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from outbox.position import Anchor, Point, Position, Snapshot, floor_of


class Verdict(Enum):
    """What the relay must do with a batch, given the position that it was read from."""

    CONTINUES = "continues"
    ADOPTED = "adopted"  # the log has a newer epoch: start anew from it
    LOST_TAIL = "lost tail"  # published entries are gone: adopt
    OTHER_CLUSTER = "other cluster"  # not the database that was published from: a person decides


@dataclass(frozen=True, slots=True)
class Head:
    """What a database says of itself as of one snapshot.

    `anchor_found`: the row of the position's anchor is there, unchanged (true when the position has none).
    `top`: the greatest entry visible, None in an empty table. `insert_lsn`: what must be on disk before anything
    that the snapshot sees is published. `system` is None where the server hides its identifier. `adopted_from` are
    the clusters whose positions were given up when a person adopted the log. The ids of this epoch lie above `base_id`.
    """

    snapshot: Snapshot
    insert_lsn: str
    system: str | None
    timeline: int
    epoch: int
    removed_id: int
    types_version: int
    anchor_found: bool
    top: Anchor | None
    adopted_from: Collection[str] = ()
    base_id: int = 0

    @property
    def point(self) -> Point:
        """The position's next point."""
        return Point(self.snapshot, self.top, self.removed_id)


def judge(position: Position, head: Head) -> Verdict:
    """Compare a position with the database as of a batch's snapshot."""
    elsewhere = position.system is not None and head.system is not None and position.system != head.system
    if head.epoch > position.epoch and (not elsewhere or position.system in head.adopted_from):
        # Whoever adopted knew the positions that were committed then; a batch of the lost tail may have been committed
        # after them, with ids that would be given a second time.
        return Verdict.ADOPTED if floor_of([position]) <= head.base_id else Verdict.LOST_TAIL
    if elsewhere:
        # Also when its epoch is newer: an unrelated database may have been adopted for reasons of its own.
        return Verdict.OTHER_CLUSTER
    anchor = position.reached.anchor
    if anchor is not None and head.anchor_found and head.snapshot.xmax <= anchor.xid:
        # The row is there, but its transaction is still to come: it was copied here. (A crash hands transaction ids
        # out again too, but never one that a durable entry bears.)
        return Verdict.OTHER_CLUSTER
    if head.epoch < position.epoch or not head.anchor_found:
        return Verdict.LOST_TAIL
    return Verdict.CONTINUES
