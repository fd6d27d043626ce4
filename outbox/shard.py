"""A shard: held against every other relay, and published by `step()`.

One step reads the next batch after the position, and publishes it in one Kafka transaction together with the new
position. The position in Kafka is the only truth: after anything that failed or whose outcome is not known, it is
read again. docs/architecture.md draws the whole.
"""

from __future__ import annotations

import enum
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from outbox import position as positions
from outbox.batch import Batch
from outbox.config import Config
from outbox.entity_type import EntityType
from outbox.errors import BrokerError, LostTailError, TooManyDeadLettersError, WrongClusterError
from outbox.hold import Hold
from outbox.kafka.faults import Aborted, Fault, Fenced, Refused, Unknown
from outbox.lineage import Verdict, judge
from outbox.pace import Pace
from outbox.plan import Part, Plan, make
from outbox.ports import Adopt, Database, Log, OpenLog
from outbox.position import Point, Position
from outbox.read_ahead import ReadAhead
from outbox.request import NAMELESS, Entity, Page, Request, Wanted
from outbox.share import KEYS, PAGED, shares
from outbox.telemetry import emit
from outbox.topic_watch import TopicWatch

log = logging.getLogger("outbox.relay")

# What a backfill adds to the latency of live changes, about; and its pages while there are none.
_PAGE_SECONDS, _QUIET_PAGE_SECONDS = 0.005, 0.15


class Did(enum.Enum):
    """What a step did."""

    TOOK_OVER = "took over"
    PUBLISHED = "published"
    ADOPTED = "adopted"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one pass.

    `entries` were read, `records` written to state topics (after collapse), `dead` dead-lettered. `more` says that
    the backlog, or a backfill, goes on: do not wait before the next step. `again`: in so many seconds there is more to
    do in any case (None: not known of). `caught_up`: everything that was committed when the shard
    was taken over is published. Where the time went, seconds: reading, preparing (collapse, messages), producing,
    waiting until PostgreSQL has flushed what is published, committing. A backlog's batch is read and prepared while the
    one before it is committed.
    """

    did: Did
    entries: int = 0
    records: int = 0
    dead: int = 0
    more: bool = False
    caught_up: bool = False
    again: float | None = None
    read_seconds: float = 0.0
    prepare_seconds: float = 0.0
    produce_seconds: float = 0.0
    flush_seconds: float = 0.0
    commit_seconds: float = 0.0


class Shard:
    """Publishes one shard of one outbox; used by one thread.

    `stop` is asked within long waits whether to give up; `token` names this holder, anew for each start; `now_ms` is
    the clock, milliseconds since 1970; `grace` is how long, in seconds, a successor is given to write its
    token. Raises the errors of `outbox.errors`: after
    `DatabaseUnavailableError` and `BrokerUnavailableError` call `forget` and step again; the others are for a person.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        open_log: OpenLog,
        adopt: Adopt,
        *,
        stop: Callable[[], bool],
        read_ahead: Executor | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        token: str | None = None,
        grace: float = 2.0,
    ) -> None:
        self._config = config
        self._number = config.shard
        self._stop = stop
        self._database = database
        self._adopt = adopt
        self._now_ms = now_ms
        self._hold = Hold(self._number, database, open_log, token=token or uuid.uuid4().hex, grace=grace, stop=stop)
        self._topics = TopicWatch(self._number, interval=config.topic_check_interval)
        self._ahead = ReadAhead(read_ahead)
        self._pace = Pace(busy=_PAGE_SECONDS, quiet=_QUIET_PAGE_SECONDS, most=config.batch_rows)
        self._paged = 0  # the backfill that the last page was of
        # After a refusal: how many messages go into one transaction, and whether it is watched.
        self._part_size: int | None = None
        self._watched = False
        self._timeline_said: int | None = None

    @property
    def has_held(self) -> bool:
        """Whether it has been taken over by this process, now or before."""
        return self._hold.has_held

    @property
    def holds(self) -> bool:
        """Whether it has been taken over and not been given up."""
        return self._hold.position is not None

    def settle(self) -> None:
        """Wait until consumers see what was committed."""
        self._hold.settle()

    def committed_positions(self) -> list[Position]:
        """The committed positions of all shards that have one; none while this one is not held."""
        return self._hold.committed_positions()

    def forget(self, *, database: bool = False, keep: bool = False) -> None:
        """Give up the hold (or, with `database`, the connection): what was begun is not gone on with.

        The position is read again by whoever takes the shard next. With `keep`, or `database`, the hold stays unless a
        transaction is open.
        """
        self._ahead.drop()
        if database:
            self._database.close()
        if self._hold.give_up(unless_idle=database or keep):
            self._part_size, self._watched = None, False

    def connect(self) -> None:
        """Connect to the database, if it is not connected."""
        if not self._database.connected:
            self._ahead.take()  # what ended the connection is raised, and said
            self._database.open()
            self._topics.seen = -1  # it may be another database, with other types under the same version

    def close(self) -> None:
        """Abort what is open and give everything but the reader back."""
        self._ahead.close()
        self._hold.close()

    # -- one pass ----------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Do one pass: take the shard if it is not held, else publish the next batch if there is one."""
        self.connect()
        kafka, position = self._hold.kafka, self._hold.position
        if kafka is None or position is None:
            return self._take()
        self._hold.heed()
        batch = self._next_batch(position)
        verdict = judge(batch.position, batch.head)
        if verdict is not Verdict.CONTINUES:
            self._ahead.drop()
            return self._mend(kafka, verdict, batch)
        removed = batch.head.removed_id
        if batch.position.point.snapshot is None and removed > batch.position.point.removed_id:
            # Pruned since this log was begun from its start: what of it is retained may be older than what is gone.
            self._ahead.drop()
            self._hold.position = replace(batch.position, point=Point(None, None, removed))
            return Step(Did.NOTHING, more=True)
        self._say_timeline(batch)
        self._report(batch)
        self._topics.follow(kafka, batch, shards=self._shards, dead=bool(self._hold.dead))
        began = time.monotonic()
        plan = self._plan(kafka, batch)
        if plan.too_large and self._topics.look_for_limits(kafka, batch, shards=self._shards):
            plan = self._plan(kafka, batch)
        try:
            if plan.empty:
                return self._nothing(kafka, batch)
            prepared_in = time.monotonic() - began + (batch.made.seconds if batch.made else 0.0)
            return self._publish(kafka, plan, batch, prepared_in=prepared_in)
        except (Fenced, Unknown, Aborted) as fault:
            self._lost(kafka, fault)
        return Step(Did.NOTHING, more=True)

    def _plan(self, kafka: Log, batch: Batch) -> Plan:
        most = self._config.max_dead_letters
        return Plan(batch, kafka.limits, self._hold.dead, now_ms=self._now_ms(), most_dead=most)

    def look_again(self) -> bool:
        """Look for something to do in a new statement; what it finds is the next step's batch."""
        position = self._hold.position
        if position is None:
            return True
        batch = self._read(position)
        told = any("done" in position.requests.get(str(request.id), ()) for request in batch.requests)
        nothing = not (batch.entries or told or shares(batch, self._hold.dead))
        if nothing and judge(position, batch.head) is Verdict.CONTINUES:
            return False
        self._ahead.keep(batch)
        return True

    def _next_batch(self, position: Position) -> Batch:
        batch = self._ahead.take()
        return batch if batch is not None and batch.position == position else self._read(position)

    def _read(self, position: Position) -> Batch:
        dead = self._hold.dead

        def wanted(requests: Sequence[Request], types: Mapping[str, EntityType]) -> Wanted:
            unfinished = [r for r in requests if not r.paused and "done" not in position.requests.get(str(r.id), ())]
            retained: dict[Entity, int] = {}
            current: list[Entity] = []
            for request in unfinished:
                progress = position.requests.get(str(request.id), {})
                if request.kind == "retry":
                    for entity in request.names(dead):
                        followed = types.get(entity[0])
                        if dead[entity] and not (
                            followed and followed.source and (followed.follows or followed.reads_source)
                        ):
                            retained[entity] = dead[entity]
                        elif not entity[1].startswith(NAMELESS):
                            current.append(entity)  # it came from the source
                elif request.kind == "publish":
                    type_name, begin = request.arguments["type"], progress.get("named", 0)
                    named = [(type_name, key) for key in request.arguments["keys"][begin : begin + KEYS]]
                    if type_name in types and types[type_name].source is not None:
                        current += named
                    else:
                        retained |= dict.fromkeys(named, request.arguments.get("from_id", 0))
            return Wanted(retained, current, self._page(unfinished, position))

        return self._database.read(position, wanted)

    def _read_and_make(self, limits: Mapping[str, int], position: Position) -> Batch:
        batch = self._read(position)
        return replace(batch, made=make(batch, limits, now_ms=self._now_ms()))

    def _page(self, requests: Sequence[Request], position: Position) -> Page | None:
        """The page that the next batch takes: of the backfills that may go on, each in its turn."""
        now = time.monotonic()
        paged = [r for r in requests if r.kind in PAGED]
        for request in sorted(paged, key=lambda r: (r.id <= self._paged, r.id)):
            rows = self._pace.rows(request.id, request.arguments.get("rate"), now)
            if rows:
                said = position.requests.get(str(request.id), {})
                arguments = request.arguments
                return Page(
                    request.id,
                    arguments["type"],
                    arguments.get("where"),
                    said.get("after"),
                    rows,
                    said.get("source"),
                    arguments if request.kind == "history" else None,
                )
        return None

    def _take(self) -> Step:
        """Take the shard over; at the first time no topic may be in the way."""
        self.forget()
        needed = () if self._hold.has_held else None

        def check(kafka: Log, types: Mapping[str, EntityType]) -> None:
            self._topics.look(kafka, types, shards=self._shards, needed=needed)

        looked_at = self._hold.take(self._database.identity, check=check)
        if looked_at is None:
            return Step(Did.NOTHING, more=True)
        self._topics.seen = looked_at
        return Step(Did.TOOK_OVER, more=True)

    @property
    def _shards(self) -> int:
        return self._database.identity.shards if self._database.identity else 1

    def _lost(self, kafka: Log, fault: Fault) -> None:
        """A transaction that failed, or may have."""
        self.forget()
        self._hold.lost(kafka, fault)

    # -- what the lineage says ---------------------------------------------------------------------------------

    def _mend(self, kafka: Log, verdict: Verdict, batch: Batch) -> Step:
        position, head = batch.position, batch.head
        if verdict is Verdict.OTHER_CLUSTER:
            raise WrongClusterError(
                f"The database behind the connection is now another cluster ({head.system}, was {position.system}).",
                cure="Correct OUTBOX_DATABASE_URL; or, if it is to take over for good: outbox adopt.",
            )
        if verdict is Verdict.LOST_TAIL:
            anchor = position.reached.anchor
            what = (
                f"The database lost its tail: entry {anchor.id if anchor else '-'} of epoch {position.epoch} was "
                f"published and is not there (epoch {head.epoch} now)."
            )
            if self._config.on_lost_tail == "stop":
                raise LostTailError(what, cure="Look at the fail-over or the restore, then: outbox adopt.")
            emit(log, "relay.lost_tail", shard=self._number, error=what)
            known = [*self.committed_positions(), position]
            self._adopt(expected_epoch=head.epoch, positions=known)
            return Step(Did.ADOPTED, more=True)
        # A newer epoch: everything retained is new, under new ids. Said in Kafka at once, also when there is nothing.
        fresh = positions.start(
            position.outbox, self._number, self._hold.token, head.epoch, head.system, head.timeline, head.removed_id
        )
        # What this adoption left behind may be lost in its turn, and with it what the sequence knew of it.
        earlier = positions.floor_of([position])
        # Nor what requests have done: it may be lost, and another request may get the number of one that is.
        fresh = replace(fresh, totals=position.totals, earlier=earlier)
        emit(log, "relay.starts_anew", shard=self._number, epoch=head.epoch)
        try:
            self._commit(kafka, Part.alone(fresh), head.insert_lsn)
        except (Fenced, Unknown, Aborted) as fault:
            self._lost(kafka, fault)
        else:
            self._hold.position = fresh
        return Step(Did.ADOPTED, more=True)

    def _say_timeline(self, batch: Batch) -> None:
        head, position = batch.head, batch.position
        if head.timeline not in {position.timeline, self._timeline_said}:
            self._timeline_said = head.timeline
            emit(log, "relay.timeline", shard=self._number, before=position.timeline, now=head.timeline)

    # -- before publishing -------------------------------------------------------------------------------------

    def _report(self, batch: Batch) -> None:
        """Tell the control table what is done already; Kafka knows it first."""
        for request in batch.requests:
            progress = batch.position.requests.get(str(request.id))
            if progress is not None and "done" in progress:
                self._database.report(request.id, progress["done"])

    # -- publishing --------------------------------------------------------------------------------------------

    def _nothing(self, kafka: Log, batch: Batch) -> Step:
        """An empty difference commits nothing, but for a position that would pin the ring, or that can be shortened."""
        position, head = batch.position, batch.head
        following = replace(batch.next(), timeline=head.timeline, requests=batch.progress)
        if position.cut is not None:
            # The end of a cut is a point of its own: what came since is read from there.
            self._hold.position = following
            return Step(Did.NOTHING, more=True, caught_up=self._past_cut(batch), read_seconds=batch.seconds)
        anchor, top, identity = position.point.anchor, head.top, self._database.identity
        # A shard without an anchor pins the ring from its start: it takes the first that there is.
        aged = (
            top is not None
            and identity is not None
            and (
                anchor is None
                or (top.id > anchor.id and (top.created_us - anchor.created_us) / 1e6 > identity.retention / 2)
            )
        )
        if aged or position.timeline != head.timeline or len(following.requests) != len(position.requests):
            self._commit(kafka, Part.alone(following), head.insert_lsn)
            self._hold.position = following
        return Step(Did.NOTHING, caught_up=True, again=self._again(), read_seconds=batch.seconds)

    def _again(self) -> float | None:
        """In how many seconds a backfill that its rate holds back may go on."""
        return self._pace.due(time.monotonic())

    def _past_cut(self, batch: Batch) -> bool:
        """Whether all that was committed at the take-over is published once this batch is."""
        if batch.cut:
            return False
        caught_up = batch.position.cut is None or not self._hold.inherited
        self._hold.inherited = False
        return caught_up

    def _publish(self, kafka: Log, plan: Plan, batch: Batch, *, prepared_in: float) -> Step:
        if batch.cut:
            # Only in a backlog, and once: it is a statement of its own. The status knows a batch by what it finds.
            self._database.show("working")
        spent = [0.0, 0.0, 0.0]
        dead = 0
        while not plan.finished:
            part = plan.part(self._part_size)
            refused: Refused | None = None
            try:
                cost = self._commit(kafka, part, batch.head.insert_lsn, ahead=self._goes_on(plan, part, batch))
                spent = [a + b for a, b in zip(spent, cost, strict=True)]
            except Refused as fault:
                refused = fault.with_traceback(None)
            if refused is not None:
                # Not while it is handled: the exception holds the producer that is to be thrown away.
                self._narrow(kafka, plan, part, refused)
                continue
            self._hold.position, self._hold.dead = part.position, plan.done(part)
            dead += len(part.letters)
            for letter in part.letters:
                emit(
                    log,
                    "relay.dead_letter",
                    shard=self._number,
                    type=letter.type,
                    key=letter.key,
                    id=letter.id,
                    reason=letter.reason,
                    message=letter.message,
                )
            if self._part_size is not None:
                self._part_size *= 2
        self._part_size, self._watched = None, False
        produced_in, flushed_in, committed_in = spent
        # Not the commit, nor the rest of the batch: what costs as much in any case must not make the pages small.
        unheld = self._paced(batch, batch.found.page_seconds + prepared_in + produced_in)
        step = Step(
            Did.PUBLISHED,
            entries=len(batch.entries),
            records=plan.records,
            dead=dead,
            more=batch.cut or unheld,
            caught_up=self._past_cut(batch),
            again=self._again(),
            read_seconds=batch.seconds,
            prepare_seconds=prepared_in,
            produce_seconds=produced_in,
            flush_seconds=flushed_in,
            commit_seconds=committed_in,
        )
        emit(
            log,
            "relay.published",
            shard=self._number,
            entries=step.entries,
            records=step.records,
            dead=step.dead,
            age_seconds=max(0, self._now_ms() - batch.entries[0][4]) / 1000 if batch.entries else 0.0,
            read_seconds=step.read_seconds,
            prepare_seconds=step.prepare_seconds,
            produce_seconds=step.produce_seconds,
            flush_seconds=step.flush_seconds,
            commit_seconds=step.commit_seconds,
        )
        return step

    def _goes_on(self, plan: Plan, part: Part, batch: Batch) -> bool:
        """Whether, once this part is published, the next batch of the same backlog or backfill is to be read."""
        if self._stop() or not plan.ends_with(part):
            return False
        # While changes come, the next page is read after this one is committed: whoever waits is read with it.
        more = batch.found.more and self._rate(batch) is None and self._pace.quiet(time.monotonic())
        return batch.cut or more

    def _rate(self, batch: Batch) -> float | None:
        paged = batch.found.paged
        return next((r.arguments.get("rate") for r in batch.requests if paged and r.id == paged.request), None)

    def _paced(self, batch: Batch, seconds: float) -> bool:
        """Tell the pace what a page cost; whether there are more rows, and no rate that holds them back."""
        paged, now = batch.found.paged, time.monotonic()
        if batch.entries:
            self._pace.changed(now)
        self._pace.keep(frozenset(request.id for request in batch.requests))
        if paged is None:
            return False
        self._paged = paged.request
        scanned = batch.found.scanned
        rows = len(batch.found.page) if scanned is None else scanned
        self._pace.took(paged.request, rows, seconds, self._rate(batch), now, asked=paged.rows)
        return batch.found.more and self._rate(batch) is None

    def _commit(self, kafka: Log, part: Part, lsn: str, *, ahead: bool = False) -> tuple[float, float, float]:
        """One Kafka transaction: a part of a batch and the position after it.

        Up to `lsn` all must be on the server's disk: also a position alone has an anchor, which a crash would lose.
        `ahead`: read the next batch meanwhile. Seconds of producing, of waiting for the disk, and of committing.
        """
        if part.letters:
            self._check_dead({*self._hold.dead, *((letter.type, letter.key) for letter in part.letters)})
        if kafka.outdated:
            self._hold.renew()
        began = time.monotonic()
        self._database.wait_flushed(lsn)
        flushed = time.monotonic()
        if ahead:
            self._ahead.begin(partial(self._read_and_make, kafka.limits), part.position)
        kafka.begin(watched=self._watched)
        kafka.send_all(part.messages)
        for letter in part.letters:
            kafka.send_dead_letter(letter)
        for entity in part.cleared:
            kafka.clear_dead_letter(*entity)
        kafka.send_position(replace(part.position, at_ms=self._now_ms()).encode())
        produced = time.monotonic()
        try:
            kafka.commit()
        except Refused as fault:
            if part.messages:
                raise
            raise _own_refused(fault) from fault
        return produced - flushed, flushed - began, time.monotonic() - produced

    def _narrow(self, kafka: Log, plan: Plan, part: Part, fault: Refused) -> None:
        """Leave out the records that are refused: those that the broker names, or the one that is refused alone."""
        self._ahead.drop()
        if fault.own is not None:
            raise _own_refused(fault)
        culprits = fault.culprits
        if not culprits and fault.suspects:
            found = kafka.probe([part.messages[place] for place in fault.suspects])
            culprits = {fault.suspects[place]: reason for place, reason in found.items()}
        self._hold.renew()
        if culprits:
            plan.refuse(culprits)
        elif len(part.messages) == 1 or (self._watched and plan.smallest(part)):
            plan.refuse(dict.fromkeys(range(len(part.messages)), str(fault)))
        elif self._watched:
            # It names no record (a batch that is too large as a whole): halve what is sent at once.
            self._part_size = len(part.messages) // 2
        self._watched = True

    def _check_dead(self, dead: set[Entity]) -> None:
        if len(dead) > self._config.max_dead_letters:
            raise TooManyDeadLettersError(
                f"Shard {self._number} has {len(dead)} dead letters, more than max_dead_letters "
                f"({self._config.max_dead_letters}): the cause is likely not the entries. Nothing was lost.",
                cure="See outbox dead-letters list for the reasons; mend them and start the relay again, or raise "
                "max_dead_letters.",
            )


def _own_refused(fault: Refused) -> BrokerError:
    return BrokerError(
        f"Kafka refused a record of the outbox's own topics (positions or dead letters): {fault.own or fault}.",
        cure="Bring their settings in line: outbox topics check, outbox topics apply.",
    )
