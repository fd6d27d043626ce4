"""The position: how far a shard has published, as a snapshot plus an anchor.

Everything here is arithmetic on values: no database, no broker, no clock. docs/position.md explains why a position
is neither an id nor a transaction id. The idea of reading by snapshots is PgQ's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import orjson

from outbox.errors import RelayError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Which transactions were visible: those below `xmax` that are not in `xip`.

    The numbers are 64-bit transaction ids (`xid8`) of top-level transactions; `xip` is sorted.
    """

    xmin: int
    xmax: int
    xip: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read PostgreSQL's text form, `xmin:xmax:xip,xip`."""
        xmin, xmax, xip = text.split(":")
        return cls(int(xmin), int(xmax), tuple(int(xid) for xid in xip.split(",")) if xip else ())

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.xip))}"

    def sees(self, xid: int) -> bool:
        """Whether a transaction that committed is visible in this snapshot."""
        return xid < self.xmax and xid not in self.xip


@dataclass(frozen=True, slots=True)
class Anchor:
    """The greatest entry visible in a snapshot, in the whole table.

    Its row is looked up again in every batch: an entry that is missing, or that is another one under the same id,
    shows that the database lost its tail. `created_us` are microseconds since 1970.
    """

    id: int
    xid: int
    created_us: int
    shard: int


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the log: a snapshot and the greatest entry visible in it.

    `floor` is what `anchor.id` would be: the greatest id that is not new by its id alone. Without an anchor (an empty
    table, or a start without a position) it is the greatest id that pruning has removed.
    """

    snapshot: Snapshot | None
    anchor: Anchor | None
    removed_id: int = 0

    @property
    def floor(self) -> int:
        """The greatest id that is judged by its transaction; every greater one is new."""
        return self.anchor.id if self.anchor else self.removed_id

    @property
    def xip(self) -> tuple[int, ...]:
        """The transactions that were in progress; none at the start of a log."""
        return self.snapshot.xip if self.snapshot else ()

    def published(self, entry_id: int, xid: int) -> bool:
        """Whether an entry lies before this point: seen by the snapshot and not above the anchor."""
        if entry_id > self.floor:
            return False
        # At the start of a log there is no snapshot: what lies below the floor was removed or is left out.
        return self.snapshot is None or self.snapshot.sees(xid)


@dataclass(frozen=True, slots=True)
class Cut:
    """A backlog that is being read in pieces, by id, up to a fixed point.

    `last_id` is the last id that is done; the pieces read what is new since the position's point, visible in
    `to.snapshot`, and `last_id < id <= to.anchor.id`.
    """

    to: Point
    last_id: int


@dataclass(frozen=True, slots=True)
class Totals:
    """What a shard has published of one entity type since the position began."""

    entries: int = 0
    records: int = 0
    dead: int = 0

    def plus(self, *, entries: int = 0, records: int = 0, dead: int = 0) -> Totals:
        """The sums."""
        return Totals(self.entries + entries, self.records + records, self.dead + dead)


@dataclass(frozen=True, slots=True)
class Position:
    """One record of the positions topic: how far one shard has published, and who holds it.

    `token` names the holder (one for each start of a relay). `system` is the cluster's system identifier, or None
    where the server hides it. `requests` maps the id of a request of the control table to its progress (a JSON
    object of the kind's own; `{"done": outcome}` when it is finished). `at_ms` is when it was made, the relay's clock.
    `earlier` is the greatest id that may have been published in an earlier epoch: the point may have no anchor yet.
    """

    outbox: str
    shard: int
    token: str
    epoch: int
    system: str | None
    timeline: int
    point: Point
    cut: Cut | None = None
    totals: Mapping[str, Totals] = field(default_factory=dict)
    requests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at_ms: int = 0
    earlier: int = 0

    @property
    def reached(self) -> Point:
        """The point whose anchor must be in the database: the cut's end, or the point itself."""
        return self.cut.to if self.cut else self.point

    def published(self, entry_id: int, xid: int) -> bool:
        """Whether an entry is published, by the full rule."""
        if self.cut is None:
            return self.point.published(entry_id, xid)
        if self.point.published(entry_id, xid):
            return True
        return self.cut.to.published(entry_id, xid) and entry_id <= self.cut.last_id

    def takes(self, entry_id: int, xid: int) -> bool:
        """Whether the batches after this position hold an entry that is visible: the rule that the queries spell out.

        Without a cut that is every entry that is new since the point; within one, those that its end sees as well and
        that are not done.
        """
        if self.point.published(entry_id, xid):
            return False
        return self.cut is None or (self.cut.to.published(entry_id, xid) and entry_id > self.cut.last_id)

    def advanced(self, to: Point, last_id: int | None) -> Position:
        """The position after a batch: at `to`, or, with `last_id`, within the cut towards it."""
        if last_id is None:
            return replace(self, point=to, cut=None)
        return replace(self, cut=Cut(to, last_id))

    # -- as a record -------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The record's value: JSON. Numbers that may exceed 53 bits are strings."""
        return orjson.dumps(
            {
                "format": FORMAT,
                "outbox": self.outbox,
                "shard": self.shard,
                "token": self.token,
                "epoch": self.epoch,
                "system": self.system,
                "timeline": self.timeline,
                "point": _encode_point(self.point),
                "cut": self.cut and {"to": _encode_point(self.cut.to), "last_id": str(self.cut.last_id)},
                "totals": {name: [t.entries, t.records, t.dead] for name, t in self.totals.items()},
                "requests": dict(self.requests),
                "at_ms": self.at_ms,
                "earlier": str(self.earlier),
            }
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read a record's value; `RelayError` when it is of another format or no position at all."""
        try:
            raw = orjson.loads(value)
            found = raw["format"]
            if found != FORMAT:
                raise RelayError(
                    f"The positions topic holds a record of format {found}; this relay reads format {FORMAT}.",
                    cure="Run the relay of the version that wrote it, or a newer one.",
                )
            cut = raw["cut"]
            return cls(
                outbox=raw["outbox"],
                shard=raw["shard"],
                token=raw["token"],
                epoch=raw["epoch"],
                system=raw["system"],
                timeline=raw["timeline"],
                point=_decode_point(raw["point"]),
                cut=cut and Cut(_decode_point(cut["to"]), int(cut["last_id"])),
                totals={name: Totals(*numbers) for name, numbers in raw["totals"].items()},
                requests=raw["requests"],
                at_ms=raw["at_ms"],
                earlier=int(raw["earlier"]),
            )
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise RelayError(
                f"A record of the positions topic is not a position: {value[:80]!r}.",
                cure="Nobody but the relay may write to that topic. Restore it, or delete the topic and have "
                "`outbox topics apply` make it anew: the retained log is then published again.",
            ) from error

    def for_prune(self) -> dict[str, Any]:
        """The shape that the SQL function `prune_slot` takes."""
        anchor = self.reached.anchor
        return {
            "shard": self.shard,
            "epoch": self.epoch,
            **_prune_point(self.point),
            "cut": self.cut and {**_prune_point(self.cut.to), "last_id": str(self.cut.last_id)},
            "row": anchor and [str(anchor.id), str(anchor.xid), str(anchor.created_us), str(anchor.shard)],
        }


def start(
    outbox: str, shard: int, token: str, epoch: int, system: str | None, timeline: int, removed_id: int
) -> Position:
    """The position before the first entry: everything retained is new, but for ids that pruning went past."""
    return Position(outbox, shard, token, epoch, system, timeline, Point(None, None, removed_id))


def floor_of(positions: Sequence[Position]) -> int:
    """The greatest id that any shard may have published, in whatever epoch: an adoption's new ids lie above it."""
    return max((floor for p in positions for floor in (p.point.floor, p.reached.floor, p.earlier)), default=0)


def _encode_point(point: Point) -> dict[str, Any]:
    anchor = point.anchor
    return {
        "snapshot": None if point.snapshot is None else str(point.snapshot),
        "anchor": anchor and [str(anchor.id), str(anchor.xid), str(anchor.created_us), anchor.shard],
        "removed_id": str(point.removed_id),
    }


def _decode_point(raw: Mapping[str, Any]) -> Point:
    anchor = raw["anchor"]
    return Point(
        None if raw["snapshot"] is None else Snapshot.parse(raw["snapshot"]),
        anchor and Anchor(int(anchor[0]), int(anchor[1]), int(anchor[2]), anchor[3]),
        int(raw["removed_id"]),
    )


def _prune_point(point: Point) -> dict[str, Any]:
    snapshot = point.snapshot
    return {
        "anchor": str(point.floor),
        # Without a snapshot nothing below the floor is unpublished: no transaction id is at or above this one.
        "xmax": str(snapshot.xmax if snapshot else 2**63 - 1),
        "xip": [str(xid) for xid in point.xip],
    }
