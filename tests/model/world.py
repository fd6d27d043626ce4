"""What the servers of a small world hold. Immutable, so that worlds can be compared and branched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from outbox.lineage import Head
from outbox.position import Anchor, Position, Snapshot

SYSTEM = "1"

T = TypeVar("T")


class Row(NamedTuple):
    """A row of `entries`. `value` is the state: the version of its entity, and the timeline that it was made on."""

    id: int
    xid: int
    shard: int
    key: str
    value: tuple[int, int]
    slot: int

    @property
    def created_us(self) -> int:
        """When: two rows of different timelines never share it."""
        return self.value[1] * 1000 + self.id


class Commit(NamedTuple):
    """A transaction that committed, in the order of the write-ahead log, and what it left in the domain's table."""

    xid: int
    changes: tuple[tuple[str, tuple[int, int]], ...]


@dataclass(frozen=True, slots=True)
class Database:
    """PostgreSQL, with the outbox and one table of entities that it publishes.

    `flushed` commits are on disk; those after them a crash loses. `durable_id` is the greatest id that it cannot hand
    out again. `generation` counts what ends every connection.
    """

    rows: tuple[Row, ...] = ()
    # What the table held before there was an outbox.
    before: tuple[tuple[str, tuple[int, int]], ...] = ()
    next_id: int = 1
    next_xid: int = 10
    completed: int = 9
    running: frozenset[int] = frozenset()
    commits: tuple[Commit, ...] = ()
    flushed: int = 0
    epoch: int = 1
    removed_id: int = 0
    timeline: int = 1
    generation: int = 1
    lost_tail: bool = False
    requests: tuple[int, ...] = ()
    # Ids of this epoch lie above it.
    base_id: int = 0
    # How often the log was adopted for the tail that was lost last.
    adoptions: int = 0

    # -- what a snapshot sees ------------------------------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot:
        """As PostgreSQL takes it: `xmax` is one above the last that has ended, not the next to be handed out."""
        xmax = self.completed + 1
        xip = tuple(sorted(xid for xid in self.running if xid < xmax))
        return Snapshot(min((*self.running, xmax)), xmax, xip)

    def committed(self, xid: int) -> bool:
        """Whether a transaction has committed."""
        return any(commit.xid == xid for commit in self.commits)

    @property
    def visible(self) -> list[Row]:
        """The rows of committed transactions, in id order."""
        xids = {commit.xid for commit in self.commits}
        return sorted(row for row in self.rows if row.xid in xids)

    @property
    def domain(self) -> dict[str, tuple[int, int]]:
        """The table of entities, as committed."""
        return dict(self.before) | {key: value for commit in self.commits for key, value in commit.changes}

    def head(self, position: Position) -> Head:
        """What the first statement of a batch answers."""
        visible = self.visible
        anchor = position.reached.anchor
        top = visible[-1] if visible else None
        return Head(
            snapshot=self.snapshot,
            insert_lsn=str(len(self.commits)),
            system=SYSTEM,
            timeline=self.timeline,
            epoch=self.epoch,
            removed_id=self.removed_id,
            types_version=1,
            anchor_found=anchor is None or any(anchor == anchor_of(row) for row in visible),
            top=anchor_of(top) if top else None,
            base_id=self.base_id,
        )

    # -- what transactions do ------------------------------------------------------------------------------------

    def begin(self) -> tuple[Database, int]:
        """Hand out a transaction id."""
        xid = self.next_xid
        return replace(self, next_xid=xid + 1, running=self.running | {xid}), xid

    def insert(self, xid: int, shard: int, key: str, value: tuple[int, int]) -> Database:
        """An entry, by a running transaction."""
        row = Row(self.next_id, xid, shard, key, value, self.next_id % 2)
        return replace(self, rows=(*self.rows, row), next_id=self.next_id + 1)

    def end(self, xid: int, *, commit: bool, changes: tuple[tuple[str, tuple[int, int]], ...], flush: bool) -> Database:
        """Commit or roll back."""
        ended = replace(self, running=self.running - {xid}, completed=max(self.completed, xid))
        if not commit:
            return replace(ended, rows=tuple(row for row in self.rows if row.xid != xid))
        commits = (*self.commits, Commit(xid, changes))
        return replace(ended, commits=commits, flushed=len(commits) if flush else self.flushed)

    def crash(self, *, lost: int = 0, pooled: bool = False) -> Database:
        """Restart with what is on disk; or, with `lost`, fail over to a standby that misses the last commits.

        Transaction ids and ids that left nothing on disk are handed out again. `pooled`: nobody's connection shows it.
        """
        kept = self.commits[: max(self.flushed - lost, 0)]
        xids = {commit.xid for commit in kept}
        rows = tuple(row for row in self.rows if row.xid in xids)
        last = max(xids, default=9)
        return replace(
            self,
            rows=rows,
            commits=kept,
            flushed=len(kept),
            running=frozenset(),
            next_xid=last + 1,
            completed=last,
            next_id=max((row.id for row in rows), default=self.removed_id) + 1,
            timeline=self.timeline + (1 if lost else 0),
            generation=self.generation + (0 if pooled else 1),
            lost_tail=self.lost_tail or lost > 0,
            adoptions=0 if lost else self.adoptions,
        )

    def adopt(self, floor: int, least_epoch: int) -> Database:
        """Every retained entry gets, in id order, a new id and the adopting transaction's xid."""
        begun, xid = self.begin()
        base = max(self.next_id - 1, floor, *(row.id for row in self.rows), 0)
        old = sorted(row for row in self.visible if row.id > self.removed_id)
        new = tuple(row._replace(id=base + place, xid=xid) for place, row in enumerate(old, start=1))
        below = tuple(row for row in self.rows if row.id <= self.removed_id)
        adopted = begun.end(xid, commit=True, changes=(), flush=True)
        return replace(
            adopted,
            rows=below + new,
            next_id=base + len(new) + 1,
            epoch=max(self.epoch + 1, least_epoch),
            base_id=base,
            # Again is right where the first did not know of all that had been published.
            adoptions=self.adoptions + (not self.adoptions or floor <= self.base_id),
        )

    def prunable(self, slot: int, positions: tuple[bytes | None, ...]) -> bool:
        """Whether a slot of the ring may be emptied: the rule of the SQL function `prune_slot`, but for its age."""
        rows = [row for row in self.rows if row.slot == slot]
        last = max((row.id for row in rows), default=0)
        older = [row for row in self.rows if row.id <= last]
        # Of those too that are in other slots: a start, or an adoption, leaves out all up to the greatest removed.
        if not rows or any(row.xid in self.running for row in older):
            return False
        for shard, value in enumerate(positions):
            position = Position.decode(value) if value is not None else None
            if position is None or position.epoch != self.epoch:
                return False
            anchors = {point.anchor.id for point in (position.point, position.reached) if point.anchor}
            if any(row.id in anchors for row in rows) or last >= position.reached.floor:
                return False
            if position.reached.anchor is not None and position.reached.anchor not in map(anchor_of, self.visible):
                return False
            if any(row.shard == shard and not position.published(row.id, row.xid) for row in older):
                return False
        return True

    def prune(self, slot: int) -> Database:
        """Empty a slot, and record the greatest id removed."""
        gone = [row.id for row in self.rows if row.slot == slot]
        kept = tuple(row for row in self.rows if row.slot != slot)
        return replace(self, rows=kept, removed_id=max(self.removed_id, *gone))


def anchor_of(row: Row) -> Anchor:
    """A row as the anchor of a position."""
    return Anchor(row.id, row.xid, row.created_us, row.shard)


class Record(NamedTuple):
    """A record of the state topic that a `read_committed` consumer gets."""

    key: str
    id: int
    value: tuple[int, int]
    epoch: int


class Transaction(NamedTuple):
    """What a producer has sent and asked to commit: records, dead letters (None: cleared), the position after them."""

    records: tuple[Record, ...]
    letters: tuple[tuple[tuple[str, str], int | None], ...]
    position: bytes

    @classmethod
    def of(
        cls,
        sent: tuple[Record, ...],
        letters: tuple[tuple[tuple[str, str], int | None], ...],
        position: bytes,
    ) -> Transaction:
        """Of what the relay sends: its records are of the position's epoch."""
        epoch = Position.decode(position).epoch
        return cls(tuple(record._replace(epoch=epoch) for record in sent), letters, position)


@dataclass(frozen=True, slots=True)
class Kafka:
    """The state topic, the positions, the dead letters, and who may write: everything by shard."""

    topic: tuple[Record, ...] = ()
    positions: tuple[bytes | None, ...] = (None,)
    # Whose producer is the newest; all others are fenced. The name is enough: an epoch would count for ever.
    producers: tuple[str, ...] = ("",)
    dead: frozenset[tuple[tuple[str, str], int]] = frozenset()
    # Commits whose answer got lost, and that may still arrive until somebody takes the shard over.
    late: tuple[Transaction | None, ...] = (None,)
    # Positions were lost: the retained log is published again, and only its end must be right.
    republishes: bool = False

    def take(self, shard: int, token: str) -> Kafka:
        """`init_transactions`: everybody else is fenced, what is open is aborted."""
        return replace(self, producers=_put(self.producers, shard, token), late=_put(self.late, shard, None))

    def commit(self, shard: int, transaction: Transaction) -> Kafka:
        """All of it, at once."""
        written = self.write(transaction)
        return replace(written, positions=_put(written.positions, shard, transaction.position))

    def write(self, transaction: Transaction) -> Kafka:
        """The records and the dead letters alone."""
        dead = dict(self.dead)
        for entity, number in transaction.letters:
            dead.pop(entity, None)
            if number is not None:
                dead[entity] = number
        return replace(self, topic=self.topic + transaction.records, dead=frozenset(dead.items()))

    def delay(self, shard: int, transaction: Transaction) -> Kafka:
        """A commit that nobody hears of, and that may still be done."""
        return replace(self, late=_put(self.late, shard, transaction))

    def land(self, shard: int) -> Kafka:
        """It is done."""
        late = self.late[shard]
        assert late is not None
        return replace(self.commit(shard, late), late=_put(self.late, shard, None))


@dataclass(frozen=True, slots=True)
class Writer:
    """A session of the owning service: a program, how far it is, its transaction and its savepoint.

    Operations: `x` take a transaction id early; a key: change that entity and write its entry; `(` savepoint, `)`
    roll back to it; `.` commit, `~` commit asynchronously, `!` roll back.
    """

    program: str
    at: int = 0
    xid: int | None = None
    changes: tuple[tuple[str, tuple[int, int]], ...] = ()
    kept: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.at == len(self.program)


@dataclass(frozen=True, slots=True)
class World:
    """Everything but the relays. The numbers say how many of each misfortune may still come."""

    database: Database
    kafka: Kafka
    writers: tuple[Writer, ...]
    kills: int = 0
    crashes: int = 0
    failovers: int = 0
    # How many commits a fail-over may lose.
    tail: int = 1
    # Whether a connection shows a fail-over, or a pooler hides it.
    pooled: tuple[bool, ...] = (False, True)
    lost_answers: int = 0
    stalls: int = 0
    aborts: int = 0
    # How often the broker refuses a record, and how often a topic's limit is changed.
    refusals: int = 0
    limits: int = 0
    prunes: int = 0
    # What whoever prunes has read: positions may have moved on, or be lost, when it empties a slot.
    pruner: tuple[bytes | None, ...] | None = None
    lost_positions: int = 0
    shards: int = 1

    def shard_of(self, key: str) -> int:
        """The share of a key."""
        return (ord(key) - ord("A")) % self.shards


def _put(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1 :])
