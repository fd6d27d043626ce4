"""A shard: held against every other relay, and published by `step()`.

One step reads the next batch after the position, and publishes it in one Kafka transaction together with the new
position. The position in Kafka is the only truth: after anything that failed or whose outcome is not known, it is
read again. docs/architecture.md draws the whole.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from outbox import position as positions
from outbox.batch import Batch, Entity, Request
from outbox.config import Config
from outbox.entity_type import EntityType
from outbox.errors import (
    BrokerError,
    DatabaseUnavailableError,
    FencedError,
    LostTailError,
    TooManyDeadLettersError,
    TopicError,
    WrongClusterError,
    WrongOutboxError,
)
from outbox.kafka.faults import Aborted, Fault, Fenced, Refused, Unknown
from outbox.lineage import Head, Verdict, judge
from outbox.plan import Part, Plan
from outbox.ports import Adopt, Identity, Log, OpenLog, Source
from outbox.position import Point, Position
from outbox.telemetry import emit

log = logging.getLogger("outbox.relay")

# Seconds at the least between two looks at the topics because something is too large.
_LIMITS_SECONDS = 3.0
_GRACE_LOOK_SECONDS = 0.1


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
    the backlog goes on: do not wait before the next step. `caught_up`: everything that was committed when the shard
    was taken over is published. Where the time went, seconds: reading, preparing (collapse, messages), producing,
    waiting until PostgreSQL has flushed what is published, committing. The reading of a backlog's batch goes on beside
    the commit of the one before it.
    """

    did: Did
    entries: int = 0
    records: int = 0
    dead: int = 0
    more: bool = False
    caught_up: bool = False
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
        source: Source,
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
        self._source = source
        self._open_log = open_log
        self._adopt = adopt
        self._now_ms = now_ms
        self._grace = grace
        self._token = token or uuid.uuid4().hex
        self._kafka: Log | None = None
        self._position: Position | None = None
        self._dead: Mapping[Entity, int] = {}
        self._ahead: Future[Batch] | None = None
        self._thread = read_ahead or ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox-read-ahead")
        # After a refusal: how many messages go into one transaction, and whether it is watched.
        self._part_size: int | None = None
        self._watched = False
        self._types_seen = 0
        self._troubles: Mapping[str, TopicError] = {}
        self._checked_at = 0.0
        self._timeline_said: int | None = None
        # Whether the cut that is being read was begun by a former holder, before this one took over.
        self._inherited = False
        self._has_held = False
        self._heeded: str | None = None

    @property
    def has_held(self) -> bool:
        """Whether it has been taken over by this process, now or before."""
        return self._has_held

    @property
    def holds(self) -> bool:
        """Whether it has been taken over and not been given up."""
        return self._kafka is not None and self._position is not None

    def close(self) -> None:
        """Abort what is open and give everything but the reader back."""
        self._drop_ahead()
        self._thread.shutdown(wait=True)
        self._position = None
        kafka, self._kafka = self._kafka, None
        if kafka is not None:
            kafka.close()

    # -- one pass ----------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Do one pass: take the shard if it is not held, else publish the next batch if there is one."""
        if not self._source.connected:
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                ahead.result()  # what ended the connection is raised, and said
            self._source.open()
            self._types_seen = -1  # it may be another database, with other types under the same version
        kafka, position = self._kafka, self._position
        if kafka is None or position is None:
            self._take(self._source.identity)
            return Step(Did.TOOK_OVER if self.holds else Did.NOTHING, more=True)
        self._heed(kafka)
        batch = self._next_batch(position)
        verdict = judge(batch.position, batch.head)
        if verdict is not Verdict.CONTINUES:
            self._drop_ahead()
            return self._mend(kafka, verdict, batch)
        removed = batch.head.removed_id
        if batch.position.point.snapshot is None and removed > batch.position.point.removed_id:
            # Pruned since this log was begun from its start: what of it is retained may be older than what is gone.
            self._drop_ahead()
            self._position = replace(batch.position, point=Point(None, None, removed))
            return Step(Did.NOTHING, more=True)
        self._say_timeline(batch)
        self._report(batch)
        self._follow_types(kafka, batch)
        began = time.monotonic()
        plan = Plan(batch, kafka.limits, self._dead, now_ms=self._now_ms())
        if plan.too_large and time.monotonic() > self._checked_at + _LIMITS_SECONDS:
            # The limit may have been raised meanwhile: a verdict that stays needs a look.
            self._check(kafka, batch.types, needed=self._topics_of(batch))
            plan = Plan(batch, kafka.limits, self._dead, now_ms=self._now_ms())
        try:
            if plan.empty:
                return self._nothing(kafka, batch)
            return self._publish(kafka, plan, batch, prepared_in=time.monotonic() - began)
        except (Fenced, Unknown, Aborted) as fault:
            self._lost(kafka, fault)
        return Step(Did.NOTHING, more=True)

    def look_again(self) -> bool:
        """Look for something to do in a new statement; what it finds is the next step's batch."""
        position = self._position
        if position is None:
            return True
        batch = self._read(position)
        if not (batch.entries or batch.requests) and judge(position, batch.head) is Verdict.CONTINUES:
            return False
        self._drop_ahead()
        self._ahead = Future()
        self._ahead.set_result(batch)
        return True

    def _next_batch(self, position: Position) -> Batch:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            batch = ahead.result()
            if batch.position == position:
                return batch
        return self._read(position)

    def _read(self, position: Position) -> Batch:
        done, dead = position.requests, self._dead

        def wanted(requests: Sequence[Request]) -> Mapping[Entity, int]:
            again = (r for r in requests if r.kind == "retry" and str(r.id) not in done)
            return {entity: dead[entity] for request in again for entity in request.names(dead)}

        return self._source.read(position, wanted)

    def _drop_ahead(self) -> None:
        """Throw away what was read ahead: after a failed or unknown commit it starts from the wrong place."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            if not ahead.cancelled():
                ahead.exception()  # waits: the connection is used by one thread at a time

    # -- holding the shard -------------------------------------------------------------------------------------

    def _take(self, identity: Identity | None) -> None:
        """Take the shard over: fence any other holder, read its position, write it with the own token."""
        if identity is None:
            raise DatabaseUnavailableError("There is no connection to the database.")
        self.forget()
        number = self._number
        kafka = self._open_log(identity.name, number, stop=self._stop)
        former: str | None = None
        try:
            types = self._source.look(self._start(identity))[1]
            self._check(kafka, types, needed=None if not self._has_held else ())
            # Before anybody is fenced: a relay of the wrong database must not disturb the right one, and one that comes
            # back from an outage must not take the shard from its successor.
            before, _ = self._look_from(kafka, identity)
            if before is not None and self._has_held and before.token != self._token:
                raise self._superseded()
            former = before.token if before is not None else None
            kafka.take()
            found, head = self._look_from(kafka, identity)
            if found is None:
                position = self._start(identity, head)
                emit(log, "relay.new_log", shard=number, removed_id=head.removed_id)
            else:
                former = found.token
                position = replace(found, token=self._token)
            dead = {(letter.type, letter.key): letter.id for letter in kafka.read_dead_letters()}
            kafka.begin()
            kafka.send_position(position.encode())
            kafka.commit()
        except Fault as fault:
            self._lost(kafka, fault, former=former)
            return
        except BaseException:
            kafka.discard()
            raise
        self._kafka, self._position, self._dead = kafka, position, dead
        self._inherited = position.cut is not None
        self._has_held = True
        self._types_seen = head.types_version
        emit(log, "relay.holds", shard=number, outbox=identity.name, token=self._token, epoch=position.epoch)
        self._source.announce(self._token)

    def _heed(self, kafka: Log) -> None:
        """Stop for a relay that said it took the shard, if it did; Kafka tells an idle holder only later."""
        said = self._source.announced
        if said in {None, self._token, self._heeded}:
            return
        self._heeded = said
        value = kafka.read_position()
        if value is not None and Position.decode(value).token != self._token:
            raise self._superseded()

    def _start(self, identity: Identity, head: Head | None = None) -> Position:
        """The position of a log that was never published; without a head only good for looking."""
        if head is None:
            return positions.start(identity.name, self._number, self._token, 0, None, 0, 0)
        return positions.start(
            identity.name, self._number, self._token, head.epoch, identity.system, head.timeline, head.removed_id
        )

    def _look_from(self, kafka: Log, identity: Identity) -> tuple[Position | None, Head]:
        """The committed position, if there is one, and the database as it is after that was read.

        In this order: what pruning has removed before the position was lost must be known to whoever starts without.
        """
        value = kafka.read_position()
        found = Position.decode(value) if value is not None else None
        if found is not None and (found.outbox != identity.name or found.shard != self._number):
            raise WrongOutboxError(
                f'The positions topic of "{identity.name}" holds a record of "{found.outbox}", shard {found.shard}, '
                f"where shard {self._number} was expected.",
                cure="Somebody else wrote to this topic; see docs/guarantees.md.",
            )
        head = self._source.look(found or self._start(identity))[0]
        if found is not None and judge(found, head) is Verdict.OTHER_CLUSTER:
            raise WrongClusterError(
                f"The database is another cluster (system identifier {identity.system}) than the one that "
                f'"{identity.name}" was published from ({found.system}): a copy, or a wrong database URL.',
                cure="Correct OUTBOX_DATABASE_URL; or, if this copy is to take over for good: outbox adopt.",
            )
        return found, head

    def forget(self, *, database: bool = False, keep: bool = False) -> None:
        """Give up the hold (or, with `database`, the connection): what was begun is not gone on with.

        The position is read again by whoever takes the shard next. With `keep`, or `database`, the hold stays unless a
        transaction is open.
        """
        self._drop_ahead()
        if database:
            self._source.close()
        if (database or keep) and (self._kafka is None or not self._kafka.in_transaction):
            return
        kafka, self._kafka = self._kafka, None
        self._position = None
        self._part_size, self._watched = None, False
        if kafka is not None:
            kafka.discard()

    def _lost(self, kafka: Log, fault: Fault, *, former: str | None = None) -> None:
        """A transaction that failed, or may have: the hold is given up; another holder's token says that it is lost.

        `former`: whose token was there before the own was written, while it may not have been.
        """
        aborted = isinstance(fault, Aborted)
        if aborted:
            emit(log, "relay.aborted", shard=self._number, reason=str(fault))
        else:
            emit(log, "relay.hold_in_doubt", shard=self._number, reason=str(fault))
        self.forget()
        kafka.discard()
        if aborted or self._stop():
            return
        # Fenced, and the own token still there: a stall, or a successor that has not written its own yet. Taking the
        # shard back at once would fence it in its turn.
        deadline = time.monotonic() + (self._grace if isinstance(fault, Fenced) and former is None else 0.0)
        while True:
            value = kafka.read_position()
            holder = Position.decode(value).token if value is not None else None
            if holder not in {None, self._token, former}:
                raise self._superseded()
            if time.monotonic() >= deadline or self._stop():
                return
            time.sleep(_GRACE_LOOK_SECONDS)

    def _superseded(self) -> FencedError:
        return FencedError(
            f"Another relay took over shard {self._number} of this outbox; this one stops, having lost nothing.",
            cure="Run one relay a shard. If this one is to publish, stop the other and start it again.",
        )

    def _renew(self, kafka: Log) -> None:
        """Take a fresh producer in the middle of a step.

        It fences whoever has taken the shard since: then the position bears another token, and to go on from what is
        in memory would publish again what the successor has published.
        """
        kafka.renew()
        value = kafka.read_position()
        if value is not None and Position.decode(value).token != self._token:
            raise self._superseded()

    def settle(self) -> None:
        """Wait until consumers see what was committed.

        Kafka acknowledges a commit before it has marked it in the partitions; a fresh producer of the same id is
        given only afterwards. Whoever drains and then reads finds everything.
        """
        if self._kafka is not None:
            # Somebody else who takes it at the same moment waits for the same.
            with contextlib.suppress(Fault):
                self._kafka.renew()

    def committed_positions(self) -> list[Position]:
        """The committed positions of all shards that have one; none while this one is not held."""
        if self._kafka is None:
            return []
        return [Position.decode(value) for value in self._kafka.read_all_positions() if value is not None]

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
            position.outbox, self._number, self._token, head.epoch, head.system, head.timeline, head.removed_id
        )
        # What this adoption left behind may be lost in its turn, and with it what the sequence knew of it.
        earlier = positions.floor_of([position])
        fresh = replace(fresh, totals=position.totals, requests=position.requests, earlier=earlier)
        emit(log, "relay.starts_anew", shard=self._number, epoch=head.epoch)
        try:
            self._commit(kafka, Part.alone(fresh), head.insert_lsn)
        except (Fenced, Unknown, Aborted) as fault:
            self._lost(kafka, fault)
        else:
            self._position = fresh
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
                self._source.report(request.id, progress["done"])

    def _follow_types(self, kafka: Log, batch: Batch) -> None:
        """Look at the topics when they may be others: now and then, too, since anybody may change them."""
        if (
            batch.head.types_version != self._types_seen
            or (batch.requests and self._dead)
            or (batch.entries and time.monotonic() > self._checked_at + self._config.topic_check_interval)
            or (self._troubles and not self._troubles.keys().isdisjoint(self._topics_of(batch)))
        ):
            self._check(kafka, batch.types, needed=self._topics_of(batch))
            self._types_seen = batch.head.types_version

    @staticmethod
    def _topics_of(batch: Batch) -> set[str]:
        names = {entry[1] for entry in batch.entries}
        return {t.topic for t in batch.types.values() if t.name in names}

    def _check(self, kafka: Log, types: Mapping[str, EntityType], *, needed: Collection[str] | None) -> None:
        """Refuse topics that must not be published to, among those `needed` (None: all); the others are said once."""
        identity = self._source.identity
        troubles = kafka.check(types, shards=identity.shards if identity else 1)
        self._checked_at = time.monotonic()
        said, self._troubles = self._troubles, troubles
        for topic, error in troubles.items():
            if needed is None or topic in needed:
                raise error
            if topic not in said:
                emit(log, "relay.topic", shard=self._number, topic=topic, error=error.message, cure=error.cure)

    # -- publishing --------------------------------------------------------------------------------------------

    def _nothing(self, kafka: Log, batch: Batch) -> Step:
        """An empty difference commits nothing, but for a position that would pin the ring, or that can be shortened."""
        position, head = batch.position, batch.head
        following = replace(batch.next(), timeline=head.timeline, requests=batch.progress)
        if position.cut is not None:
            # The end of a cut is a point of its own: what came since is read from there.
            self._position = following
            return Step(Did.NOTHING, more=True, caught_up=self._past_cut(batch), read_seconds=batch.seconds)
        anchor, top, identity = position.point.anchor, head.top, self._source.identity
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
            self._position = following
        return Step(Did.NOTHING, caught_up=True, read_seconds=batch.seconds)

    def _past_cut(self, batch: Batch) -> bool:
        """Whether all that was committed at the take-over is published once this batch is."""
        if batch.cut:
            return False
        caught_up = batch.position.cut is None or not self._inherited
        self._inherited = False
        return caught_up

    def _publish(self, kafka: Log, plan: Plan, batch: Batch, *, prepared_in: float) -> Step:
        if batch.cut:
            # Only in a backlog, and once: it is a statement of its own. The status knows a batch by what it finds.
            self._source.show("working")
        spent = [0.0, 0.0, 0.0]
        dead = 0
        while not plan.finished:
            part = plan.part(self._part_size)
            refused: Refused | None = None
            try:
                cost = self._commit(kafka, part, batch.head.insert_lsn, last_id=batch.last_id)
                spent = [a + b for a, b in zip(spent, cost, strict=True)]
            except Refused as fault:
                refused = fault.with_traceback(None)
            if refused is not None:
                # Not while it is handled: the exception holds the producer that is to be thrown away.
                self._narrow(kafka, plan, part, refused)
                continue
            self._position, self._dead = part.position, plan.done(part)
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
        step = Step(
            Did.PUBLISHED,
            entries=len(batch.entries),
            records=plan.records,
            dead=dead,
            more=batch.cut,
            caught_up=self._past_cut(batch),
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

    def _commit(self, kafka: Log, part: Part, lsn: str, *, last_id: int | None = None) -> tuple[float, float, float]:
        """One Kafka transaction: a part of a batch and the position after it.

        Up to `lsn` all must be on the server's disk: also a position alone has an anchor, which a crash would lose.
        `last_id` is where the batch was cut. Seconds of producing, of waiting for the disk, and of committing.
        """
        if part.letters:
            self._check_dead({*self._dead, *((letter.type, letter.key) for letter in part.letters)})
        if kafka.outdated:
            self._renew(kafka)
        began = time.monotonic()
        self._source.wait_flushed(lsn)
        flushed = time.monotonic()
        cut = part.position.cut
        if last_id is not None and cut is not None and cut.last_id == last_id and not self._stop():
            # The batch's last part: while it is sent and committed, the next batch of the same cut is read.
            self._ahead = self._thread.submit(self._read, part.position)
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
        self._drop_ahead()
        if fault.own is not None:
            raise _own_refused(fault)
        culprits = fault.culprits
        if not culprits and fault.suspects:
            found = kafka.probe([part.messages[place] for place in fault.suspects])
            culprits = {fault.suspects[place]: reason for place, reason in found.items()}
        self._renew(kafka)
        if culprits:
            plan.refuse(culprits)
        elif len(part.messages) == 1:
            plan.refuse({0: str(fault)})
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
