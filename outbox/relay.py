"""The relay: a loop around `step()`.

One step reads the next batch after the position, collapses it, and publishes it in one Kafka transaction together
with the new position. The position in Kafka is the only truth: after anything that failed or whose outcome is not
known, it is read again. docs/architecture.md draws the whole.
"""

from __future__ import annotations

import enum
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from outbox import position as positions
from outbox.adoption import adopt_log
from outbox.collapse import collapse
from outbox.config import Config
from outbox.dead_letter import DeadLetter
from outbox.errors import (
    BrokerUnavailableError,
    DatabaseUnavailableError,
    FencedError,
    LostTailError,
    OutboxError,
    TooManyDeadLettersError,
    WrongClusterError,
    WrongOutboxError,
)
from outbox.kafka.faults import Aborted, Fenced, Refused, Unknown
from outbox.kafka.shard_log import ShardLog
from outbox.lineage import Verdict, judge
from outbox.message import Message, Unpublishable, messages
from outbox.position import Position
from outbox.pruning import prune_ring
from outbox.reader import Batch, Identity, Reader, Request, Wake, Wanted
from outbox.telemetry import emit

log = logging.getLogger("outbox.relay")


class Did(enum.Enum):
    """What a step did."""

    TOOK_OVER = "took over"
    PUBLISHED = "published"
    ADOPTED = "adopted"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one pass. Times in seconds.

    `entries` were read, `records` written to state topics (after collapse), `dead` dead-lettered. `more` says that
    the backlog goes on: do not wait before the next step. `caught_up`: everything committed before this step's read
    is published.
    """

    did: Did
    entries: int = 0
    records: int = 0
    dead: int = 0
    more: bool = False
    caught_up: bool = False
    read_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass(slots=True)
class _Plan:
    """One batch made ready: everything that its transaction, or its transactions when it is halved, will hold."""

    batch: Batch
    messages: list[Message]
    unpublishable: list[Unpublishable]
    replayed: list[Message] = field(default_factory=list)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)


class Relay:
    """Publishes one shard of one outbox.

    `done` sums up what this process has published. `run()` goes on until `wake` is set; it returns, having left
    nothing half-done. Raises the errors of
    `outbox.errors` that a person must act upon; what passes by itself is waited for.
    """

    def __init__(self, config: Config, *, wake: Wake | None = None) -> None:
        self._config = config
        self._shard = config.shard
        self._wake = wake or Wake()
        self._reader = Reader(config, shard=config.shard)
        self._token = uuid.uuid4().hex
        self._kafka: ShardLog | None = None
        self._identity: Identity | None = None
        self._position: Position | None = None
        self._dead: dict[tuple[str, str], int] = {}
        self._ahead: Future[Batch] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox-read-ahead")
        self._slice: int | None = None
        self._types_seen = 0
        self._timeline_said: int | None = None
        self._next_prune = 0.0
        self.done = Step(Did.NOTHING)

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self, *, until_caught_up: bool = False) -> Step:
        """Step until stopped, or until all that was committed at the start is published; the last step."""
        waiting_for: str | None = None
        tries = 0
        last = Step(Did.NOTHING)
        try:
            while not self._wake.is_set:
                try:
                    last = self.step()
                except (DatabaseUnavailableError, BrokerUnavailableError) as error:
                    what = "database" if isinstance(error, DatabaseUnavailableError) else "kafka"
                    self._forget(what)
                    if waiting_for != what:
                        emit(log, "relay.waiting", shard=self._shard, what=what, error=error.message, cure=error.cure)
                        waiting_for = what
                    self._reader_shows(f"waiting:{what}")
                    tries += 1
                    self._wake.wait(min(self._config.backoff_max, 0.05 * 2 ** min(tries, 12)))
                    continue
                if waiting_for is not None:
                    emit(log, "relay.resumed", shard=self._shard, what=waiting_for)
                    waiting_for = None
                tries = 0
                if self._config.prune and not last.more:
                    self._prune_sometimes()
                if until_caught_up and last.caught_up:
                    self._settle()
                    break
                if not last.more and not until_caught_up:
                    self._sleep()
        except OutboxError as error:
            self._reader_shows(f"stuck:{type(error).__name__}")
            raise
        finally:
            self.close()
        return last

    def _settle(self) -> None:
        """Wait until consumers see what was committed.

        Kafka acknowledges a commit before it has marked it in the partitions; a fresh producer of the same id is
        given only afterwards. Whoever drains and then reads finds everything.
        """
        if self._kafka is not None and self.done.did is Did.PUBLISHED:
            self._kafka.renew()

    def _prune_sometimes(self) -> None:
        """Prune, if it is time; by the committed positions of all shards, like the command."""
        if time.monotonic() < self._next_prune or self._kafka is None:
            return
        self._next_prune = time.monotonic() + self._config.prune_interval
        found = [Position.decode(value) for value in self._kafka.read_all_positions() if value is not None]
        for pruned in prune_ring(self._config, found):
            if pruned.pruned:
                emit(log, "relay.pruned", shard=self._shard, slot=pruned.slot, entries=pruned.entries)

    def close(self) -> None:
        """Abort what is open and give everything back."""
        self._drop_ahead()
        self._thread.shutdown(wait=True)
        if self._kafka is not None:
            self._kafka.close()
            self._kafka = None
        self._reader.close()

    def _sleep(self) -> None:
        """Wait until there may be something to read.

        Falling asleep: LISTEN (since the connection was made), *try* the doorbell, look once more in a new statement,
        sleep. A writer that began before the bell was held is seen by that look or rings afterwards.
        """
        try:
            if not self._reader.try_bell():
                # A writer holds it for as long as its transaction is open: waiting for it would delay the others.
                self._reader_shows("idle")
                self._wake.wait(
                    self._config.busy_poll_interval
                    if self._identity is not None and self._identity.doorbell
                    else self._config.poll_interval
                )
                return
            try:
                if self._position is not None:
                    batch = self._read(self._position)
                    if self._something(batch):
                        # What the look has found need not be read twice.
                        self._ahead = Future()
                        self._ahead.set_result(batch)
                        return
                self._reader.show("idle")
                self._reader.wait_rung(self._config.poll_interval, self._wake)
            finally:
                # First be awake, then read: a writer that comes between stays silent and is read.
                self._reader.release_bell()
        except DatabaseUnavailableError:
            # Said once, by the step that meets it next.
            self._reader.close()

    def _something(self, batch: Batch) -> bool:
        return bool(batch.entries or batch.requests) or judge(batch.position, batch.head) is not Verdict.CONTINUES

    # -- one pass ----------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Do one pass: take the shard if it is not held, else publish the next batch if there is one."""
        if not self._reader.connected:
            self._drop_ahead()
            self._identity = self._reader.open()
        if self._kafka is None or self._position is None:
            self._take()
            return Step(Did.TOOK_OVER, more=True)
        batch = self._next_batch(self._position)
        verdict = judge(batch.position, batch.head)
        if verdict is not Verdict.CONTINUES:
            self._drop_ahead()
            return self._mend(verdict, batch)
        self._say_timeline(batch)
        try:
            return self._publish(batch)
        except (Fenced, Unknown) as fault:
            self._drop_ahead()
            self._lost_hold(fault)
        except Aborted as fault:
            emit(log, "relay.aborted", shard=self._shard, reason=str(fault))
            self._drop_ahead()
            self._release()
        return Step(Did.NOTHING, more=True)

    def _next_batch(self, position: Position) -> Batch:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            batch = ahead.result()
            if batch.position == position:
                return batch
        return self._read(position)

    def _read(self, position: Position) -> Batch:
        return self._reader.read(position, self._wanted)

    def _wanted(self, requests: Sequence[Request]) -> Wanted:
        if self._position is None:
            return Wanted()
        keys = [
            key
            for request in requests
            if request.kind == "retry" and str(request.id) not in self._position.requests
            for key in self._named(request)
        ]
        return Wanted(keys, min((self._dead[key] for key in keys), default=0))

    def _named(self, request: Request) -> list[tuple[str, str]]:
        """The dead letters of this shard that a request names."""
        type_name, keys = request.arguments.get("type"), request.arguments.get("keys")
        return [
            entity
            for entity in self._dead
            if (type_name is None or entity[0] == type_name) and (keys is None or entity[1] in keys)
        ]

    # -- holding the shard -------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Take the shard over: fence any other holder, read its position, write it with the own token."""
        identity = self._identity
        if identity is None:
            raise DatabaseUnavailableError("There is no connection to the database.")
        self._release()
        head = self._reader.look(positions.start(identity.name, self._shard, self._token, 0, None, 0, 0))
        kafka = ShardLog(self._config, identity.name, self._shard, stop=lambda: self._wake.is_set)
        try:
            kafka.check(self._reader.types, shards=identity.shards)
            kafka.take()
            value = kafka.read_position()
            if value is None:
                position = positions.start(
                    identity.name, self._shard, self._token, head.epoch, identity.system, head.timeline, head.removed_id
                )
                emit(log, "relay.new_log", shard=self._shard, removed_id=head.removed_id)
            else:
                found = Position.decode(value)
                if found.outbox != identity.name or found.shard != self._shard:
                    raise WrongOutboxError(
                        f'The positions topic of "{identity.name}" holds a record of "{found.outbox}", shard '
                        f"{found.shard}, where shard {self._shard} was expected.",
                        cure="Somebody else wrote to this topic; see docs/guarantees.md.",
                    )
                position = replace(found, token=self._token)
            self._dead = {(letter.type, letter.key): letter.id for letter in kafka.read_dead_letters()}
            self._refuse_other_cluster(position, identity)
            kafka.begin()
            kafka.send_position(position.encode())
            kafka.commit()
        except BaseException:
            kafka.discard()
            raise
        self._kafka, self._position = kafka, position
        self._types_seen = head.types_version
        emit(log, "relay.holds", shard=self._shard, outbox=identity.name, token=self._token, epoch=position.epoch)

    def _refuse_other_cluster(self, position: Position, identity: Identity) -> None:
        """Before anything is written: a wrong database must not even take the token."""
        if judge(position, self._reader.look(position)) is Verdict.OTHER_CLUSTER:
            raise WrongClusterError(
                f"The database is another cluster (system identifier {identity.system}) than the one that "
                f'"{identity.name}" was published from ({position.system}): a copy, or a wrong database URL.',
                cure="Correct OUTBOX_DATABASE_URL; or, if this copy is to take over for good: outbox adopt.",
            )

    def _release(self) -> None:
        """Give the producer up; the position is read again by whoever takes the shard next."""
        kafka, self._kafka = self._kafka, None
        self._position = None
        self._slice = None
        if kafka is not None:
            kafka.discard()

    def _lost_hold(self, fault: Exception) -> None:
        """Decide what a fenced producer, or a commit of unknown outcome, means: another holder's token says it."""
        kafka, position = self._kafka, self._position
        if kafka is None or position is None:
            return
        emit(log, "relay.hold_in_doubt", shard=self._shard, reason=str(fault))
        kafka.discard()
        value = kafka.read_position()
        holder = Position.decode(value).token if value is not None else None
        self._release()
        if holder not in {None, self._token}:
            raise FencedError(
                f'Another relay took over shard {self._shard} of "{position.outbox}"; this one stops, having lost '
                "nothing.",
                cure="Run one relay a shard. If this one is to publish, stop the other and start it again.",
            )

    def _forget(self, what: str) -> None:
        self._drop_ahead()
        if what == "database":
            self._reader.close()
        if what == "kafka" or (self._kafka is not None and self._kafka.in_transaction):
            # Also when PostgreSQL went away in the middle: what was begun is not gone on with.
            self._release()

    def _drop_ahead(self) -> None:
        """Throw away what was read ahead: after a failed or unknown commit it starts from the wrong place."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            if not ahead.cancelled():
                ahead.exception()  # waits: the connection is used by one thread at a time

    def _reader_shows(self, state: str) -> None:
        try:
            self._reader.show(state)
        except OutboxError:
            self._reader.close()

    # -- what the lineage says ---------------------------------------------------------------------------------

    def _mend(self, verdict: Verdict, batch: Batch) -> Step:
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
            if self._kafka is None:
                return Step(Did.NOTHING, more=True)
            emit(log, "relay.lost_tail", shard=self._shard, error=what)
            others = [Position.decode(value) for value in self._kafka.read_all_positions() if value is not None]
            epoch = adopt_log(self._config, expected_epoch=head.epoch, positions=[*others, position], from_system=None)
            emit(log, "relay.adopted", shard=self._shard, epoch=epoch)
            return Step(Did.ADOPTED, more=True)
        # A newer epoch: everything retained is new, under new ids. Said in Kafka at once, also when there is nothing.
        fresh = positions.start(
            position.outbox, self._shard, self._token, head.epoch, head.system, head.timeline, head.removed_id
        )
        fresh = replace(fresh, totals=position.totals, requests=position.requests)
        emit(log, "relay.starts_anew", shard=self._shard, epoch=head.epoch)
        self._commit_alone(fresh)
        return Step(Did.ADOPTED, more=True)

    def _say_timeline(self, batch: Batch) -> None:
        head, position = batch.head, batch.position
        if head.timeline not in {position.timeline, self._timeline_said}:
            self._timeline_said = head.timeline
            emit(log, "relay.timeline", shard=self._shard, before=position.timeline, now=head.timeline)

    def _commit_alone(self, position: Position) -> None:
        kafka = self._kafka
        if kafka is None:
            return
        try:
            kafka.begin()
            kafka.send_position(self._stamped(position).encode())
            kafka.commit()
        except (Fenced, Unknown) as fault:
            self._lost_hold(fault)
            return
        except Aborted:
            self._release()
            return
        self._position = position

    def _stamped(self, position: Position) -> Position:
        return replace(position, at_ms=_now_ms())

    # -- publishing --------------------------------------------------------------------------------------------

    def _publish(self, batch: Batch) -> Step:
        kafka = self._kafka
        if kafka is None:
            return Step(Did.NOTHING, more=True)
        self._finish_requests(batch)
        self._follow_types(kafka, batch)
        open_requests = [r for r in batch.requests if str(r.id) not in batch.position.requests]
        if not batch.entries and not open_requests:
            return self._nothing(batch)
        self._reader_shows_working()
        plan = self._plan(kafka, batch, open_requests)
        commit_seconds = 0.0
        begin, position, dead_letters = 0, batch.position, 0
        while True:
            # Normally one transaction takes the whole batch. After a refusal it is halved until the record that is
            # refused stands alone: each half is committed with a position of its own, cut by id.
            size = self._slice or max(len(plan.messages), 1)
            part = plan.messages[begin : begin + size]
            final = begin + size >= len(plan.messages)
            began = time.monotonic()
            try:
                after, dead = self._transact(kafka, plan, part, position, final=final)
            except Refused as fault:
                dead_entry = self._narrow(kafka, plan, part, begin, fault)
                if dead_entry is not None:
                    plan.unpublishable.append(dead_entry)
                    del plan.messages[begin]
                    self._slice = None if begin >= len(plan.messages) else 1
                continue
            commit_seconds += time.monotonic() - began
            dead_letters += dead
            self._position = position = after
            if final:
                break
            begin += size
            self._slice = min(size * 2, len(plan.messages))
        self._slice = None
        step = Step(
            Did.PUBLISHED,
            entries=len(batch.entries),
            records=len(plan.messages) + len(plan.replayed),
            dead=dead_letters,
            more=batch.cut,
            caught_up=not batch.cut and batch.position.cut is None,
            read_seconds=batch.seconds,
            commit_seconds=commit_seconds,
        )
        self.done = replace(
            step,
            entries=self.done.entries + step.entries,
            records=self.done.records + step.records,
            dead=self.done.dead + step.dead,
        )
        emit(
            log,
            "relay.published",
            shard=self._shard,
            entries=step.entries,
            records=step.records,
            dead=step.dead,
            read_seconds=step.read_seconds,
            commit_seconds=step.commit_seconds,
        )
        return step

    def _reader_shows_working(self) -> None:
        # Once a sleep, not once a batch: it is a statement of its own.
        self._reader.show("working")

    def _nothing(self, batch: Batch) -> Step:
        """An empty difference commits nothing, but for a position that would pin the ring or ends a cut."""
        position, head = batch.position, batch.head
        following = batch.next()
        if position.cut is not None:
            # The end of a cut is a point of its own: what came since is read from there.
            self._position = replace(following, timeline=head.timeline)
            return Step(Did.NOTHING, more=True, read_seconds=batch.seconds)
        anchor, top = position.point.anchor, head.top
        reported = {k: v for k, v in position.requests.items() if int(k) in {r.id for r in batch.requests}}
        aged = (
            anchor is not None
            and top is not None
            and top.id > anchor.id
            and self._identity is not None
            and (top.created_us - anchor.created_us) / 1e6 > self._identity.retention / 2
        )
        if aged or position.timeline != head.timeline or len(reported) != len(position.requests):
            self._commit_alone(replace(following, timeline=head.timeline, requests=reported))
        return Step(Did.NOTHING, caught_up=True, read_seconds=batch.seconds)

    def _plan(self, kafka: ShardLog, batch: Batch, requests: Sequence[Request]) -> _Plan:
        types, limits, now = self._reader.types, kafka.limits, _now_ms()
        made, unpublishable = messages(collapse(batch.entries, types), types, limits, now_ms=now)
        plan = _Plan(batch, made, unpublishable)
        in_batch = {(e[1], e[2]) for e in batch.entries} if requests else set()
        retained = {(e[1], e[2]): e for e in batch.retained}
        for request in requests:
            named = self._named(request)
            if request.kind == "drop":
                plan.dropped += named
                plan.outcomes[str(request.id)] = {"done": {"dropped": len(named)}}
                continue
            again = [retained[entity] for entity in named if entity in retained and entity not in in_batch]
            replayed, still = messages(again, types, limits, now_ms=now)
            plan.replayed += replayed
            plan.unpublishable += still
            gone = [entity for entity in named if entity not in retained and entity not in in_batch]
            plan.outcomes[str(request.id)] = {
                "done": {
                    "retried": len(replayed) + sum(entity in in_batch for entity in named),
                    "refused": len(still),
                    "not_retained": [list(entity) for entity in gone],
                }
            }
        return plan

    def _transact(
        self, kafka: ShardLog, plan: _Plan, part: Sequence[Message], position: Position, *, final: bool
    ) -> tuple[Position, int]:
        """One Kafka transaction: the messages of a part, what belongs to them, and the position after them."""
        batch = plan.batch
        kafka.begin()
        kafka.send_all(part)
        upto = None if final else part[-1].entry[0]
        # A part ends at an id; what cannot be published goes with the part that its id lies in.
        dead = [u for u in plan.unpublishable if upto is None or u.entry[0] <= upto]
        cleared = {entity for m in part if (entity := (m.entry[1], m.entry[2])) in self._dead} if self._dead else set()
        letters = [_letter(u, batch) for u in dead]
        if final:
            kafka.send_all(plan.replayed)
            cleared.update((m.entry[1], m.entry[2]) for m in plan.replayed)
            cleared.update(plan.dropped)
        cleared -= {(letter.type, letter.key) for letter in letters}
        for letter in letters:
            kafka.send_dead_letter(letter)
        for entity in cleared:
            kafka.clear_dead_letter(*entity)
        after = self._after(plan, part, position, letters, final=final, upto=upto)
        self._check_dead({**dict.fromkeys(self._dead), **dict.fromkeys((x.type, x.key) for x in letters)})
        self._reader.wait_flushed(batch.head.insert_lsn)
        if final and batch.cut and not self._wake.is_set:
            self._ahead = self._thread.submit(self._read, after)
        kafka.send_position(self._stamped(after).encode())
        kafka.commit()
        for letter in letters:
            self._dead[letter.type, letter.key] = letter.id
            emit(
                log,
                "relay.dead_letter",
                shard=self._shard,
                type=letter.type,
                key=letter.key,
                id=letter.id,
                reason=letter.reason,
                message=letter.message,
            )
        for entity in cleared:
            self._dead.pop(entity, None)
        if final:
            plan.unpublishable.clear()
        else:
            plan.unpublishable = [u for u in plan.unpublishable if u not in dead]
        return after, len(letters)

    def _after(
        self,
        plan: _Plan,
        part: Sequence[Message],
        position: Position,
        letters: Sequence[DeadLetter],
        *,
        final: bool,
        upto: int | None,
    ) -> Position:
        batch = plan.batch
        cut = batch.position.cut
        after = batch.next() if final else position.advanced(cut.to if cut else batch.head.point, upto)
        done = position.cut.last_id if position.cut else 0
        taken = Counter(
            map(itemgetter(1), batch.entries)
            if final and done == (cut.last_id if cut else 0)
            else (e[1] for e in batch.entries if e[0] > done and (upto is None or e[0] <= upto))
        )
        written = Counter(m.entry[1] for m in part)
        if final:
            written.update(m.entry[1] for m in plan.replayed)
        lettered = Counter(letter.type for letter in letters)
        totals = dict(position.totals)
        for name in taken.keys() | written.keys() | lettered.keys():
            totals[name] = totals.get(name, positions.Totals()).plus(
                entries=taken[name], records=written[name], dead=lettered[name]
            )
        requests = dict(position.requests)
        if final:
            requests.update(plan.outcomes)
        return replace(after, totals=totals, requests=requests, timeline=batch.head.timeline)

    def _narrow(
        self, kafka: ShardLog, plan: _Plan, part: Sequence[Message], begin: int, fault: Refused
    ) -> Unpublishable | None:
        """Halve what is sent at once; the entry that is refused alone, when it stands alone."""
        self._drop_ahead()
        kafka.renew()
        extra = begin + len(part) >= len(plan.messages) and bool(plan.replayed)
        if len(part) > 1:
            self._slice = max(len(part) // 2, 1)
            return None
        if extra:
            # A retried dead letter may be the culprit: it stays one, and the rest goes on without it.
            for message in plan.replayed:
                plan.unpublishable.append(_refused(message, fault))
            plan.replayed.clear()
            return None
        if not part:
            raise fault
        return _refused(part[0], fault)

    def _check_dead(self, dead: Mapping[tuple[str, str], None]) -> None:
        if len(dead) > self._config.max_dead_letters:
            raise TooManyDeadLettersError(
                f"Shard {self._shard} has {len(dead)} dead letters, more than max_dead_letters "
                f"({self._config.max_dead_letters}): the cause is likely not the entries. Nothing was lost.",
                cure="See outbox dead-letters list for the reasons; mend them and start the relay again, or raise "
                "max_dead_letters.",
            )

    def _finish_requests(self, batch: Batch) -> None:
        """Tell the control table what is done already; Kafka knows it first."""
        for request in batch.requests:
            progress = batch.position.requests.get(str(request.id))
            if progress is not None and "done" in progress:
                self._reader.report(request.id, progress["done"])

    def _follow_types(self, kafka: ShardLog, batch: Batch) -> None:
        if batch.head.types_version != self._types_seen or (batch.requests and self._dead):
            # A changed type may point to another topic, and a raised limit is what a retry waits for.
            kafka.check(self._reader.types, shards=self._identity.shards if self._identity else 1)
            self._types_seen = batch.head.types_version


def _letter(refused: Unpublishable, batch: Batch) -> DeadLetter:
    entry = refused.entry
    return DeadLetter(
        id=entry[0],
        type=entry[1],
        key=entry[2],
        topic=refused.topic,
        reason=refused.reason,
        message=refused.explanation,
        created_ms=entry[4],
        epoch=batch.head.epoch,
        at_ms=_now_ms(),
    )


def _refused(message: Message, fault: Refused) -> Unpublishable:
    return Unpublishable(message.entry, message.topic, "refused", f"the broker refused the record: {fault}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
