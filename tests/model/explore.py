"""Every interleaving of a small world, breadth first; what is wrong is told by the shortest way that leads to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model import holder as holders
from model.holder import TYPE, TYPES, Holder
from model.promises import Wrong, check_records
from model.world import Database, Kafka, Row, Transaction, World, Writer
from outbox.batch import Batch
from outbox.entry import Entry
from outbox.lineage import Head
from outbox.position import Position, floor_of
from outbox.request import Found as Sourced
from outbox.request import Page, Request
from outbox.request import Row as SourcedRow

RETRY, BACKFILL = 7, 8
REQUESTS = {
    RETRY: Request(RETRY, "retry", {"type": None, "keys": None}),
    BACKFILL: Request(BACKFILL, "backfill", {"type": TYPE}),
}
"""What may be asked for, by number."""


class State(NamedTuple):
    """A world and its relays."""

    world: World
    relays: tuple[Holder, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for states in which the same may happen."""
        return self.world, tuple(relay.key for relay in self.relays)


class Next(NamedTuple):
    """Something that may happen, in words, and what is then."""

    what: str
    state: State


@dataclass(frozen=True)
class Found:
    """What an exploration has found: how many states there are, and the first that breaks a promise, if any."""

    states: int
    ends: int
    problem: str | None = None
    way: Sequence[str] = ()

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.states} states, {self.ends} ends: right"
        steps = "\n".join(f"  {number:2}. {what}" for number, what in enumerate(self.way, start=1))
        return f"{self.problem}, after\n{steps}"


@dataclass(frozen=True)
class Rules:
    """How the world's database answers the relay; a wrong reader overrides one of them."""

    batch_rows: int = 1
    most_states: int = 400_000

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        """A batch, by the rule of `outbox.position`; tests/test_rule.py compares it with the SQL."""
        head = database.head(position)
        rows = [row for row in database.visible if row.shard == shard and position.takes(row.id, row.xid)]
        entries = [entry(row) for row in rows[: self.batch_rows]]
        last_id = entries[-1].id if len(entries) >= self.batch_rows else None
        batch = Batch(position, head, TYPES, entries, last_id)
        if self.takes_requests(batch) and database.requests:
            requests = [REQUESTS[number] for number in database.requests]
            asked = wanted(requests, TYPES)
            named = asked.retained
            last = {(TYPE, row.key): row for row in database.visible if row.shard == shard and (TYPE, row.key) in named}
            retained = sorted(entry(row) for row in last.values())
            found = Sourced(retained, looked_for=frozenset(named))
            found = self.page(database, shard, asked.page, found) if asked.page else found
            batch = replace(batch, requests=requests, found=found)
        return batch

    def page(self, database: Database, shard: int, page: Page, found: Sourced) -> Sourced:
        """The next rows of the table, as of the batch's snapshot."""
        keys = [key for key in sorted(database.domain) if page.after is None or key > page.after[0]]
        rows = [sourced(database, shard, key) for key in keys[: page.rows]]
        return replace(found, page=rows, paged=page, more=len(rows) == page.rows)

    def look(self, database: Database, position: Position) -> Head:
        """What the first statement of a batch answers, alone."""
        return database.head(position)

    def takes_requests(self, batch: Batch) -> bool:
        """Whether a batch takes requests."""
        return batch.takes_requests

    def adopt(self, database: Database, expected_epoch: int, positions: Sequence[Position]) -> Database | None:
        """Adopt; None while the lock is not to be had."""
        if database.epoch != expected_epoch:
            return database
        if any(row.xid in database.running for row in database.rows):
            return None
        return database.adopt(floor_of(positions), max((p.epoch for p in positions), default=0) + 1)

    def flush(self, database: Database, lsn: str) -> Database:
        """Wait until an LSN is on disk."""
        return replace(database, flushed=max(database.flushed, min(int(lsn), len(database.commits))))

    def commit(self, kafka: Kafka, shard: int, transaction: Transaction) -> Sequence[Kafka]:
        """The states that a commit goes through; after any of them everything may be killed."""
        return [kafka.commit(shard, transaction)]


def sourced(database: Database, shard: int, key: str) -> SourcedRow:
    """A row of the table, as a backfill reads it."""
    return SourcedRow(entry(Row(0, 0, shard, key, database.domain[key], 0)), (key,))


def entry(row: Row) -> Entry:
    """A row as the relay reads it."""
    return Entry(row.id, TYPE, row.key, b"%d %d" % row.value, row.created_us // 1000)


def explore(world: World, relays: Sequence[tuple[str, int]], rules: Rules | None = None, *, begun: int = 0) -> Found:
    """Explore everything that may happen; `relays` are the names and shards of those that may start.

    `begun`: so many of them hold their shards before anything else happens.
    """
    rules = rules or Rules()
    first = State(world, tuple(holders.start(token, number, batch_rows=rules.batch_rows) for token, number in relays))
    while (
        begun and (place := next((n for n, r in enumerate(first.relays[:begun]) if r.call != "read"), None)) is not None
    ):
        first = next(_answers(first, place, first.relays[place], rules)).state
    # Each state by its number, and from where it was come to first; and every state that leads to it.
    numbers: dict[object, int] = {first.key: 0}
    come_from: list[tuple[int, str] | None] = [None]
    leads: list[list[int]] = [[]]
    waiting = deque([first])
    ends: list[int] = []
    every = rules.batch_rows == 1 and not world.refusals and not world.kafka.dead
    while waiting:
        state = waiting.popleft()
        own = state.key
        number = numbers[own]
        still = True
        try:
            for what, after in _nexts(state, rules):
                key = after.key
                if key == own:
                    continue
                still = False
                if key not in numbers:
                    numbers[key] = len(come_from)
                    come_from.append((number, what))
                    leads.append([])
                    waiting.append(after)
                leads[numbers[key]].append(number)
            if still:
                ends.append(number)
                _check_end(state, every=every)
        except Wrong as wrong:
            last, problem = wrong.args
            return Found(len(come_from), len(ends), problem, [*_way(come_from, number), *([last] if last else [])])
        if len(come_from) > rules.most_states:
            raise AssertionError(f"more than {rules.most_states} states: make the world smaller")
    if (lost := _without_end(leads, ends)) is not None:
        return Found(len(come_from), len(ends), "nothing that may happen leads to an end", _way(come_from, lost))
    return Found(len(come_from), len(ends))


def _way(come_from: Sequence[tuple[int, str] | None], number: int) -> list[str]:
    way: list[str] = []
    while (before := come_from[number]) is not None:
        number, what = before
        way.append(what)
    return way[::-1]


def _without_end(leads: Sequence[Sequence[int]], ends: Sequence[int]) -> int | None:
    """The first state from which no way leads to an end: whoever comes there goes round and round."""
    reached = set(ends)
    waiting = deque(ends)
    while waiting:
        for number in leads[waiting.popleft()]:
            if number not in reached:
                reached.add(number)
                waiting.append(number)
    return next((number for number in range(len(leads)) if number not in reached), None)


def _nexts(state: State, rules: Rules) -> Iterator[Next]:
    world = state.world
    for place, writer in enumerate(world.writers):
        if not writer.ended:
            yield from _write(state, place, writer)
    for place, relay in enumerate(state.relays):
        if relay.over:
            continue
        yield from _answers(state, place, relay, rules)
        if world.kills:
            fresh = holders.start(relay.fields.token + "'", relay.fields.number, batch_rows=rules.batch_rows)
            yield Next(
                f"{relay.fields.token} is killed and starts again",
                _with(replace(world, kills=world.kills - 1), state.relays, place, fresh),
            )
    yield from _misfortunes(state)


# -- writers -------------------------------------------------------------------------------------------------------


def _write(state: State, place: int, writer: Writer) -> Iterator[Next]:
    world, database = state.world, state.world.database
    operation = writer.program[writer.at]
    after = replace(writer, at=writer.at + 1)
    name = f"writer {place + 1}"
    if (operation in "x(" or operation.isalpha()) and writer.xid is None:
        database, xid = database.begin()
        after = replace(after, xid=xid)
    if operation == "x":
        what = "takes a transaction id"
    elif operation == "(":
        after = replace(after, kept=len(writer.changes))
        what = "sets a savepoint"
    elif operation == ")":
        gone = [row for row in database.rows if row.xid == writer.xid][writer.kept :]
        database = replace(database, rows=tuple(row for row in database.rows if row not in gone))
        after = replace(after, changes=writer.changes[: writer.kept], kept=None)
        what = "rolls back to the savepoint"
    elif operation in ".~!":
        if writer.xid is not None:
            database = database.end(writer.xid, commit=operation != "!", changes=writer.changes, flush=operation == ".")
        after = replace(after, xid=None, changes=(), kept=None)
        what = {".": "commits", "~": "commits asynchronously", "!": "rolls back"}[operation]
    else:
        # The domain row's lock: whoever else has changed this entity must have ended.
        if any(operation in dict(other.changes) for other in world.writers if other is not writer):
            return
        own = dict(writer.changes).get(operation)
        version = (own or database.domain.get(operation) or (0, 0))[0] + 1
        value = (version, database.timeline)
        assert after.xid is not None
        database = database.insert(after.xid, world.shard_of(operation), operation, value)
        after = replace(after, changes=(*after.changes, (operation, value)))
        what = f"changes {operation} to version {version} (entry {database.next_id - 1}, transaction {after.xid})"
    writers = (*world.writers[:place], after, *world.writers[place + 1 :])
    yield Next(f"{name} {what}", State(replace(world, database=database, writers=writers), state.relays))


# -- relays --------------------------------------------------------------------------------------------------------


def _with(world: World, relays: tuple[Holder, ...], place: int, relay: Holder) -> State:
    return State(world, (*relays[:place], relay, *relays[place + 1 :]))


def _answers(state: State, place: int, relay: Holder, rules: Rules) -> Iterator[Next]:
    """What the world may answer to the call of a relay."""
    world, shard = state.world, relay.fields.number
    database, kafka = world.database, world.kafka
    token, call, arguments = relay.fields.token, relay.call, relay.arguments

    def to(world: World, given: Any, what: str = "") -> Next:
        after = holders.answer(relay, given, batch_rows=rules.batch_rows)
        while (silent := _silent(world, after)) is not None:
            after = holders.answer(after, silent, batch_rows=rules.batch_rows)
        return Next(f"{token}: {call}{what}", _with(world, state.relays, place, after))

    if call in {"read", "look", "wait_flushed", "report"} and arguments[-1] != database.generation:
        yield to(world, "database", ", the connection is gone")
        return
    match call:
        case "open":
            yield to(world, database.generation)
        case "look":
            yield to(world, rules.look(database, arguments[0]))
        case "read":
            batch = rules.read(database, shard, arguments[0], arguments[1])
            ids = [e.id for e in batch.entries]
            yield to(world, batch, f" {ids or 'nothing'}{', cut' if batch.cut else ''}")
        case "wait_flushed":
            yield to(replace(world, database=rules.flush(database, arguments[0])), True)
        case "report":
            left = tuple(number for number in database.requests if number != arguments[0])
            yield to(replace(world, database=replace(database, requests=left)), True)
        case "take":
            taken = kafka.take(shard, token)
            yield to(replace(world, kafka=taken), taken.producers[shard])
        case "outdated":
            yield to(world, False)
            yield to(replace(world, limits=world.limits - 1), True, ", a topic's limit was changed")
        case "probe":
            probing = replace(world, kafka=kafka.take(shard, token))
            yield to(probing, {}, ", nothing is refused")
            yield to(probing, {0: "as the model has it"}, ", the first is refused")
        case "read_position":
            yield to(world, kafka.positions[shard] or b"")
        case "read_all_positions":
            yield to(world, kafka.positions)
        case "read_dead_letters":
            yield to(world, tuple(sorted(kafka.dead)))
        case "adopt":
            adopted = rules.adopt(database, arguments[0], arguments[1])
            if adopted is None:
                yield to(world, "database", ", but a writer holds the table")
            else:
                yield to(replace(world, database=adopted), adopted.epoch)
        case "commit":
            yield from _commits(state, relay, rules, to)
        case _:
            raise AssertionError(call)


def _silent(world: World, relay: Holder) -> Any:
    """The answer to a call that changes nothing and that nothing can change; None for every other call.

    Whatever else may happen, happens before or after it all the same: the relay need not be stopped there.
    """
    if relay.call == "outdated" and not world.limits:
        return False
    if world.crashes or world.failovers:
        return None
    if relay.call == "open":
        return world.database.generation
    if relay.call == "read_dead_letters" and not (world.kafka.dead or world.database.requests):
        return ()
    lsn, generation = relay.arguments if relay.call == "wait_flushed" else ("", None)
    if generation == world.database.generation and int(lsn) <= world.database.flushed:
        return True
    return None


def _commits(state: State, relay: Holder, rules: Rules, to: Callable[..., Next]) -> Iterator[Next]:
    world, shard = state.world, relay.fields.number
    kafka = world.kafka
    producer, sent, letters, position, watched = relay.arguments
    if producer != kafka.producers[shard]:
        yield to(world, "fenced", ", but it is fenced")
        return
    transaction = Transaction.of(sent, letters, position)
    ids = [record.id for record in sent]
    what = f" of {ids or 'a position alone'}"
    *stages, committed = rules.commit(kafka, shard, transaction)
    for stage in stages:
        # Not all at once: killed in between, only this much is there.
        _check_topic(kafka, stage, world, what)
        yield to(replace(world, kafka=stage), "unknown", f"{what}, killed in the middle")
    _check_topic(kafka, committed, world, f"{relay.fields.token}: commit{what}")
    yield to(replace(world, kafka=committed), True, what)
    if world.lost_answers:
        less = replace(world, lost_answers=world.lost_answers - 1)
        yield to(replace(less, kafka=committed), "unknown", f"{what}, done, but the answer is lost")
        late = kafka.delay(shard, transaction)
        yield to(replace(less, kafka=late), "unknown", f"{what}, not done yet, and no answer")
    if world.aborts:
        yield to(replace(world, aborts=world.aborts - 1), "aborted", f"{what}, but it must be aborted")
    if world.refusals and sent:
        less = replace(world, refusals=world.refusals - 1)
        yield to(less, "refused", f"{what}, but a record is refused")
        if watched:
            yield to(less, "culprit", f"{what}, but the first is refused")
            yield to(less, "suspect", f"{what}, but the batch of the first is refused")
    if world.stalls:
        stalled = replace(world, stalls=world.stalls - 1, kafka=kafka.take(shard, "nobody"))
        yield to(stalled, "fenced", f"{what}, but it took longer than a transaction may")


# -- misfortunes -----------------------------------------------------------------------------------------------------


def _misfortunes(state: State) -> Iterator[Next]:
    world, relays = state
    database, kafka = world.database, world.kafka
    for shard, late in enumerate(kafka.late):
        if late is not None:
            landed = kafka.land(shard)
            _check_topic(kafka, landed, world, "the late commit arrives")
            yield Next("the late commit arrives", State(replace(world, kafka=landed), relays))
    ended = tuple(
        replace(w, at=len(w.program) if w.xid else w.at, xid=None, changes=(), kept=None) for w in world.writers
    )
    if world.crashes:
        crashed = database.crash()
        what = f"PostgreSQL crashes; transaction ids go on from {crashed.next_xid}"
        after = replace(world, database=crashed, writers=ended, crashes=world.crashes - 1)
        _check_durable(after, what)
        yield Next(what, State(after, relays))
    if world.failovers and database.flushed:
        for pooled in world.pooled:
            for missing in range(1, min(world.tail, database.flushed) + 1):
                over = database.crash(lost=missing, pooled=pooled)
                hidden = ", behind a pooler" if pooled else ""
                after = replace(world, database=over, writers=ended, failovers=world.failovers - 1)
                yield Next(f"PostgreSQL fails over, the last {missing} commits are lost{hidden}", State(after, relays))
    if world.prunes and world.pruner is None and any(kafka.positions):
        after = replace(world, pruner=kafka.positions)
        yield Next("the positions are read, to prune", State(after, relays))
    if world.prunes and world.pruner is not None:
        for slot in (0, 1):
            if database.prunable(slot, world.pruner):
                after = replace(world, database=database.prune(slot), prunes=world.prunes - 1, pruner=None)
                yield Next(f"slot {slot} is pruned, up to entry {after.database.removed_id}", State(after, relays))
    if world.lost_positions and any(kafka.positions):
        lost = replace(kafka, positions=(None,) * len(kafka.positions), republishes=True)
        # docs/guarantees.md: not in the very moment in which somebody prunes by them.
        after = replace(world, kafka=lost, lost_positions=world.lost_positions - 1, pruner=None)
        yield Next("the positions topic is lost", State(after, relays))


# -- promises ------------------------------------------------------------------------------------------------------


def _check_topic(before: Kafka, after: Kafka, world: World, what: str) -> None:
    """No duplicate, no older state after a newer; one adoption for one lost tail."""
    if after.republishes:
        return
    check_records(after.topic, len(before.topic), what)
    if world.database.adoptions > 1:
        raise Wrong(what, "the log was adopted twice for one lost tail")


def _check_durable(world: World, what: str) -> None:
    """What a crash loses has not been published."""
    if world.database.lost_tail:
        return
    ids = {row.id for row in world.database.rows}
    for record in world.kafka.topic:
        if record.id not in ids and record.id > world.database.removed_id and record.epoch == world.database.epoch:
            raise Wrong(what, f"entry {record.id} of {record.key} is published, and the crash has lost it")


def _check_end(state: State, *, every: bool) -> None:
    """Nothing more happens: every entity's last record is what the database holds.

    `every`: batches of one entry collapse nothing, so that every state that was committed must have been published,
    where nothing is refused.
    """
    world = state.world
    database = world.database
    last = {record.key: record.value for record in world.kafka.topic}
    retained = {row.key for row in database.visible if row.id > database.removed_id}
    held = {relay.fields.number for relay in state.relays if not relay.over}
    dead = dict(world.kafka.dead)
    for relay in state.relays:
        if relay.over not in {"", "FencedError"}:
            raise Wrong("", f"{relay.fields.token} stopped with {relay.over}")
    if missing := {world.shard_of(key) for key in database.domain} - held:
        raise Wrong("", f"no relay is left for shard {min(missing)}")
    newest = {row.key: row.id for row in database.visible}
    for key, value in sorted(database.domain.items()):
        if (TYPE, key) in dead and dead[TYPE, key] == newest.get(key, 0):
            continue  # refused, and said so
        if database.lost_tail and value[1] < database.timeline and not (database.adoptions and key in retained):
            # Its last states may be lost below an anchor that is in place: that is said, and reconciling proves it.
            continue
        if last.get(key) != value:
            raise Wrong("", f"{key} has version {value[0]}, its last record {last.get(key, ('none',))[0]}")
    if every and not (database.lost_tail or world.kafka.republishes):
        published = {(record.key, record.value) for record in world.kafka.topic}
        for commit in database.commits:
            for key, value in commit.changes:
                if (key, value) not in published:
                    raise Wrong("", f"version {value[0]} of {key} was committed and never published")
