"""The promise in larger worlds: hypothesis moves writers, relays and misfortunes around a real PostgreSQL.

tests/model explores small worlds wholly; here the reader's SQL, adoption, pruning and the snapshots are the real ones,
and the worlds have more of everything. Each wrong way is the same machine with one rule left out, and must fail.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.holder import TYPE, fault
from model.promises import Wrong, check_records
from model.real import DAY_US, SLOTS, WRITERS, Copy, Place, Relay
from model.world import Kafka, Transaction
from outbox.batch import Batch
from outbox.errors import FencedError
from outbox.position import Point, Position
from outbox.reader import Reader

pytestmark = pytest.mark.postgres

SMALL, LARGE = 5_000, 1_000_000
"""What the topic takes, bytes."""
TOMBSTONE = (0, 0)
"""As `model.holder.LogPort` reads a record without a value."""
APART_US = DAY_US // 2
"""From one entry to the next, microseconds: a slot takes two."""

Value = tuple[int, int]
"""A state: its number, unlike any other's, and how many fail-overs there had been."""


class Right:
    """What a wrong way overrides. `at_once`: messages and position are committed by one transaction."""

    at_once = True

    def read(self, place: Place, reader: Reader, position: Position, wanted: Callable[..., Any]) -> Batch:
        """Read a batch."""
        return reader.read(position, wanted)

    def pruned(self, place: Place) -> None:
        """After a slot was emptied."""


class OpenWriter:
    """A transaction of the owning service: what it has changed, and how much of that at each savepoint."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, Value]] = []
        self.savepoints: list[int] = []

    @property
    def holds(self) -> set[str]:
        """The keys whose rows it has locked."""
        return {key for key, _ in self.changes}


class Worlds(RuleBasedStateMachine):
    """Writers, relays, Kafka, and what may befall them.

    A fail-over is modelled without a second server: the relays' database is set back, in one transaction, to a copy of
    itself as it was when an earlier transaction had committed - entries, entities, epoch, greatest id removed and the
    sequence. So the anchor's row is missing, or another one has its id, as after a real one; only transaction ids
    do not come again (tests/test_faults.py has that on real servers, tests/model by itself). What anybody asked for in
    the control table stays.
    """

    def __init__(self, places: Mapping[int, Place], way: Right, seen: Counter[str]) -> None:
        super().__init__()
        self._places = places
        self._way = way
        self._seen = seen
        self.place: Place = places[1]
        self.limits: dict[str, int] = {"topic": SMALL}
        self.kafka = Kafka()
        self.relays: list[Relay] = []
        self.writers: dict[int, OpenWriter] = {}
        self.copies: list[tuple[Copy, int]] = []
        # What has committed, in order, and is not lost.
        self.committed: list[tuple[str, Value]] = []
        self.known_positions: list[Position] | None = None
        self.now_us = 0
        self.number = 0
        self.started = 0
        self.fail_overs = 0
        self.lost_positions = 0
        # Keys whose last changes were lost, and that neither changed since nor were adopted: not promised.
        self.damaged: set[str] = set()
        # How many records there were when positions were lost, and how many are checked.
        self.republished_from = 0
        self.checked = 0
        self.epoch = 1
        self.adoptions = 0
        # Ids of the epoch that the last adoption began lie above it.
        self.base = 0
        self.letters = 0
        self.without: set[int] = set()  # shards of which a relay was killed

    @initialize(shards=st.sampled_from([1, 2]), batch_rows=st.sampled_from([1, 2, 3, 100]), collapse=st.booleans())
    def begin(self, shards: int, batch_rows: int, collapse: bool) -> None:
        self.place = self._places[shards]
        self.place.reset(collapse=collapse)
        self.batch_rows, self.collapse = batch_rows, collapse
        self.kafka = Kafka(positions=(None,) * shards, producers=("",) * shards, late=(None,) * shards)
        self.copies = [(self.place.copy(), 0)]
        for shard in range(shards):
            self._start(shard)
            self.relays[-1].step()

    # -- writers ---------------------------------------------------------------------------------------------------

    def _key(self, number: int, writer: int) -> str | None:
        """One of the keys that no other open transaction holds: the lock of the entity's row would be waited for."""
        held = {key for other, opened in self.writers.items() if other != writer for key in opened.holds}
        free = [key for key in self.place.keys if key not in held]
        return free[number % len(free)] if free else None

    def _write(self, writer: int, number: int, what: str) -> None:
        key = self._key(number, writer)
        if key is None:
            return
        opened = self.writers.setdefault(writer, OpenWriter())
        self.number += 1
        self.now_us += APART_US
        value = TOMBSTONE if what == "deletes" else (self.number, 1 + self.fail_overs)
        state = b"%d %d" % value + b" " * (SMALL if what == "too large" else 0)
        session = self.place.writers[writer]
        self.place.change(session, key, None if value == TOMBSTONE else state, self.now_us)
        opened.changes.append((key, value))

    def _commit(self, writer: int) -> None:
        opened = self.writers.pop(writer)
        self.place.writers[writer].commit()
        self.committed += opened.changes
        self.damaged -= opened.holds
        self.copies = [*self.copies[-3:], (self.place.copy(), len(self.committed))]

    writer = st.integers(0, WRITERS - 1)
    what = st.sampled_from(["changes"] * 4 + ["deletes", "too large"])

    @rule(writer=writer)
    def writer_takes_an_xid(self, writer: int) -> None:
        """Early: before it writes anything."""
        self.writers.setdefault(writer, OpenWriter())
        self.place.writers[writer].execute("SELECT pg_current_xact_id()")

    @rule(writer=writer, number=st.integers(0, 3), what=what)
    def writer_writes(self, writer: int, number: int, what: str) -> None:
        self._write(writer, number, what)

    @rule(writer=writer, numbers=st.lists(st.tuples(st.integers(0, 3), what), min_size=1, max_size=3))
    def writer_writes_and_commits(self, writer: int, numbers: Sequence[tuple[int, str]]) -> None:
        for number, what in numbers:
            self._write(writer, number, what)
        if writer in self.writers:
            self._commit(writer)

    @rule(writer=writer, number=st.integers(0, 3), ends=st.booleans())
    def writers_overtake(self, writer: int, number: int, ends: bool) -> None:
        """One has its entry first; others commit first, and are published; `ends`: then it commits."""
        self._write(writer, number, "changes")
        for other in range(WRITERS):
            if other != writer:
                self._write(other, number + 1, "changes")
                if other in self.writers:
                    self._commit(other)
        self.relays_step(2)
        if ends and writer in self.writers:
            self._commit(writer)

    @precondition(lambda self: self.writers)
    @rule(writer=writer, back=st.booleans())
    def savepoint(self, writer: int, back: bool) -> None:
        """Set one, or roll back to the last one."""
        opened = self.writers.get(writer)
        if opened is None:
            return
        session = self.place.writers[writer]
        if not back:
            session.execute("SAVEPOINT here")
            opened.savepoints.append(len(opened.changes))
        elif opened.savepoints:
            session.execute("ROLLBACK TO SAVEPOINT here")
            session.execute("RELEASE SAVEPOINT here")
            del opened.changes[opened.savepoints.pop() :]

    @precondition(lambda self: self.writers)
    @rule(number=writer, rolls_back=st.sampled_from([False, False, True]))
    def writer_ends(self, number: int, rolls_back: bool) -> None:
        writer = sorted(self.writers)[number % len(self.writers)]
        if rolls_back:
            del self.writers[writer]
            self.place.writers[writer].rollback()
        else:
            self._commit(writer)

    @rule(days=st.integers(1, 2))
    def time_passes(self, days: int) -> None:
        """The clock points at another slot; a quiet shard's anchor gets old."""
        self.now_us += days * DAY_US

    # -- relays ----------------------------------------------------------------------------------------------------

    def _of(self, shard: int) -> list[Relay]:
        return [relay for relay in self.relays if relay.shard == shard and not relay.ended]

    def _pick(self, number: int) -> Relay | None:
        running = [relay for relay in self.relays if not relay.ended]
        return running[number % len(running)] if running else None

    relay = st.integers(0, 3)
    how = st.sampled_from(["done", "done", "done", "lost", "late", "stalled"])

    @rule(shard=st.integers(0, 1), takes=st.booleans())
    def another_relay_starts(self, shard: int, takes: bool) -> None:
        """Beside the one that holds the shard: whether it takes it over at once, or waits before each call."""
        shard %= self.place.shards
        if len(self._of(shard)) < 2:
            self._start(shard)
            if takes:
                self.relays[-1].step()

    def _start(self, shard: int) -> None:
        self.started += 1
        self.relays.append(Relay(self, f"r{self.started}", shard, batch_rows=self.batch_rows))
        self.relays[-1].go_on()

    @rule(number=relay, calls=st.integers(1, 6), how=how)
    def relay_goes_on(self, number: int, calls: int, how: str) -> None:
        """Some calls, up to a commit; `how` the last of them ends. There it stops: a zombie, when it goes on late."""
        relay = self._pick(number)
        while relay is not None and not relay.ended and calls:
            calls = 0 if relay.call == "commit" else calls - 1
            relay.go_on("done" if calls else how)

    @rule(number=relay, steps=st.integers(1, 6))
    def relay_steps(self, number: int, steps: int) -> None:
        """Whole steps, until there is nothing to do."""
        relay = self._pick(number)
        for _ in range(steps):
            if relay is not None and not relay.ended:
                relay.step()
                if relay.idle:
                    break

    @rule(steps=st.integers(1, 6))
    def relays_step(self, steps: int) -> None:
        """All of them."""
        for number in range(len(self.relays)):
            self.relay_steps(number, steps)

    @rule(number=relay, calls=st.integers(0, 6))
    def relay_is_killed(self, number: int, calls: int) -> None:
        """After some calls more; and started again."""
        relay = self._pick(number)
        while relay is not None and not relay.ended and calls:
            calls -= 1
            relay.go_on()
        if relay is not None and not relay.ended and relay.call != "open":
            self._seen["killed before a " + relay.call] += 1
            relay.kill()
            self.without.add(relay.shard)
            self._start(relay.shard)
            if self.started % 2:
                self.relays[-1].step()

    def kafka_answers(self, relay: Relay, call: str, arguments: Sequence[Any], how: str) -> Any:
        """What Kafka answers, to a relay that may be a zombie."""
        kafka, shard = self.kafka, relay.shard
        match call:
            case "take":
                self.kafka = kafka.take(shard, relay.token)
                return relay.token
            case "read_position":
                return kafka.positions[shard] or b""
            case "read_all_positions":
                return kafka.positions
            case "read_dead_letters":
                return sorted(letter for letter in kafka.dead if self.place.shard_of[letter[0][1]] == shard)
            case "commit":
                producer, *sent, _ = arguments
                self._kafka_commits(relay, producer, Transaction.of(*sent), how)
                return True
            case _:
                raise AssertionError(call)

    def _kafka_commits(self, relay: Relay, producer: str, transaction: Transaction, how: str) -> None:
        kafka, shard = self.kafka, relay.shard
        if producer != kafka.producers[shard]:
            self._seen["a zombie is fenced"] += 1
            raise fault("fenced")
        if how == "stalled":
            self.kafka = kafka.take(shard, "nobody")
            self._seen["a stall"] += 1
            raise fault("fenced")
        self._seen["a cut"] += Position.decode(transaction.position).cut is not None
        self._seen["a dead letter"] += sum(number is not None for _, number in transaction.letters)
        self._seen["a dead letter is mended"] += sum(number is None for _, number in transaction.letters)
        self.letters += len(transaction.letters)
        if how == "late":
            self.kafka = kafka.delay(shard, transaction)
            raise fault("unknown")
        if not self._way.at_once:
            self.kafka = kafka.write(transaction)
            if transaction.records and len(self.kafka.topic) % 3 == 0:
                raise fault("unknown")  # interrupted in between
            transaction = transaction._replace(records=(), letters=())
            if producer != self.kafka.producers[shard]:
                raise fault("fenced")
        self.kafka = self.kafka.commit(shard, transaction)
        if how == "lost":
            self._seen["a commit whose answer is lost"] += 1
            raise fault("unknown")

    def read(self, reader: Reader, position: Position, wanted: Callable[..., Any]) -> Batch:
        """A batch, and whether it has what the wrong ways would miss."""
        batch = self._way.read(self.place, reader, position, wanted)
        self._seen["a late entry"] += any(e[0] <= position.point.floor for e in batch.entries)
        return batch

    @precondition(lambda self: any(self.kafka.late))
    @rule()
    def a_late_commit_is_done(self) -> None:
        for shard, late in enumerate(self.kafka.late):
            if late is not None:
                self._seen["a late commit"] += 1
                self.kafka = self.kafka.land(shard)

    # -- misfortunes, requests, pruning ----------------------------------------------------------------------------

    @precondition(lambda self: self.kafka.dead)
    @rule(limit=st.sampled_from([SMALL, LARGE]))
    def a_retry(self, limit: int) -> None:
        """Of all dead letters; the topic's limit may have been changed."""
        self.limits["topic"] = limit
        self.place.request()

    @rule(slot=st.integers(0, SLOTS - 1), old=st.booleans())
    def prune(self, slot: int, old: bool) -> None:
        """Empty the first slot that can be, back from one; by the committed positions, or `old` ones."""
        if not old or self.known_positions is None:
            self.known_positions = [Position.decode(value) for value in self.kafka.positions if value is not None]
        for before in range(SLOTS):
            if self.place.prune((slot - before) % SLOTS, self.known_positions):
                self._seen["a slot is pruned"] += 1
                self._way.pruned(self.place)
                self.copies.append((self.place.copy(), len(self.committed)))
                break

    @precondition(lambda self: self.lost_positions < 2 and self.number > 5)
    @rule()
    def positions_are_lost(self) -> None:
        """From here on states are published again, in order."""
        self.lost_positions += 1
        self.republished_from = len(self.kafka.topic)
        self.kafka = replace(self.kafka, positions=(None,) * self.place.shards)
        self._seen["positions are lost"] += 1

    @precondition(lambda self: self.fail_overs < 2 and len(self.copies) > 2)
    @rule(lost=st.integers(1, 3), pooled=st.booleans())
    def fail_over(self, lost: int, pooled: bool) -> None:
        """To a standby that misses the last transactions. `pooled`: no connection shows it."""
        lost = min(lost, len(self.copies) - 1)
        for writer in list(self.writers):
            del self.writers[writer]
            self.place.writers[writer].rollback()
        del self.copies[-lost:]
        copy, known = self.copies[-1]
        self.place.restore(copy)
        self.damaged |= {key for key, _ in self.committed[known:]}
        del self.committed[known:]
        self.fail_overs += 1
        self.epoch, self.adoptions = copy.epoch, 0
        self._seen["a fail-over"] += 1
        if not pooled:
            for relay in self.relays:
                relay.cut()

    def adopted(self) -> None:
        """The log may have been adopted: what is retained is new, once for a lost tail."""
        if self.place.epoch == self.epoch:
            return
        self.epoch = self.place.epoch
        self.adoptions += 1
        self._seen["an adoption"] += 1
        self.damaged -= self.place.retained.keys()
        self.copies.append((self.place.copy(), len(self.committed)))
        # Again is right where the first did not know of all that the lost timeline had published.
        unheard = any(record.epoch < self.epoch - 1 and record.id > self.base for record in self.kafka.topic)
        self.base = self.place.base
        if self.adoptions > 1 and not (self.lost_positions or unheard):
            raise Wrong("", "the log was adopted twice for one lost tail")

    # -- promises --------------------------------------------------------------------------------------------------

    @invariant()
    def no_duplicate_and_no_older_state(self) -> None:
        if self.lost_positions and self.fail_overs:
            # Nobody knows which ids the lost tail had: they may come again, and the end must be right all the same.
            return
        topic = self.kafka.topic[self.republished_from :]
        check_records(topic, max(self.checked - self.republished_from, 0), "")
        self.checked = len(self.kafka.topic)

    @invariant()
    def nobody_stops_but_who_is_superseded(self) -> None:
        for relay in self.relays:
            if relay.over is not None and not isinstance(relay.over, FencedError):
                raise Wrong("", f"{relay.token} stopped: {relay.over}")

    def teardown(self) -> None:
        # Only what went well so far is judged to the end.
        judged = sys.exc_info()[0] is None
        try:
            if judged and self.copies:
                self._end()
        finally:
            for relay in self.relays:
                relay.kill()
            for session in self.place.writers:
                session.rollback()

    def _end(self) -> None:
        for writer in list(self.writers):
            self._commit(writer)
        self.limits["topic"] = LARGE
        self.place.request()
        for shard in range(self.place.shards):
            if not self._of(shard) and shard not in self.without:
                raise Wrong("", f"no relay is left of shard {shard}")
        self._drain()
        self._check_end()
        # An entity that changes again is mended, whatever was lost.
        for number in range(len(self.place.keys)):
            self._write(0, number, "changes")
        self._commit(0)
        self._drain()
        self._check_end()
        # The ring is emptied out of order, and whoever loses all positions then must end at the same.
        self.prune(self.now_us // DAY_US % SLOTS, old=False)
        for relay in self.relays:
            relay.kill()
        self.positions_are_lost()
        self._drain()
        self._check_end()

    def _drain(self) -> None:
        """Publish everything: every shard has a relay, and all of them go on until nothing is left to do."""
        for shard in range(self.place.shards):
            if not self._of(shard):
                self._start(shard)
        left = 100
        quiet = 0
        while quiet < 2:
            running = [relay for relay in self.relays if not relay.ended]
            before = self.kafka
            for relay in running:
                relay.step()
            self.no_duplicate_and_no_older_state()
            self.nobody_stops_but_who_is_superseded()
            for shard in range(self.place.shards):
                if not self._of(shard):
                    raise Wrong("", f"no relay is left of shard {shard}")
            quiet = quiet + 1 if before == self.kafka and all(r.idle for r in running if not r.ended) else 0
            left -= 1
            if not left:
                raise Wrong("", "it does not come to an end")

    def _check_end(self) -> None:
        things, retained, dead = self.place.things, self.place.retained, dict(self.kafka.dead)
        changed = {key for key, _ in self.committed}
        last = {record.key: record.value for record in self.kafka.topic}
        for key in self.place.keys:
            number = dead.get((TYPE, key))
            if number is not None:
                # What is not retained cannot be retried.
                if retained.get(key, 0) >= number:
                    raise Wrong("", f"entry {number} of {key} is still a dead letter")
                continue
            if key in self.damaged or key not in changed:
                continue
            words = things[key].split() if key in things else [b"0", b"0"]
            expected = int(words[0]), int(words[1])
            if last.get(key) != expected:
                raise Wrong("", f"{key} has state {expected}, its last record {last.get(key, 'none')}")
        if not (self.fail_overs or self.lost_positions):
            self._check_all()

    def _check_all(self) -> None:
        """Each state that was published was committed, in that order; and without collapse each one was published."""
        for key in self.place.keys:
            committed = [value for of, value in self.committed if of == key]
            published = [record.value for record in self.kafka.topic if record.key == key]
            left = iter(committed)
            if not all(value in left for value in published):
                raise Wrong("", f"{key} had the states {committed}, its records are {published}")
            if not self.collapse and not self.letters and committed != published:
                raise Wrong("", f"{key} had the states {committed}, its records are {published}")


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(postgres: object) -> Iterator[Mapping[int, Place]]:
    """By the number of shards: a database that all worlds use, one after another."""
    from devstack.postgres import Postgres

    assert isinstance(postgres, Postgres)
    made = {}
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        for shards in (1, 2):
            admin.execute(f"CREATE DATABASE worlds{shards}".encode())
            made[shards] = Place(postgres.url(f"worlds{shards}"), shards)
        yield made
        for shards, place in made.items():
            place.close()
            admin.execute(f"DROP DATABASE worlds{shards} WITH (FORCE)".encode())


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """A relay says much in a hundred worlds."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


SETTINGS = settings(
    # The same worlds each time; others, when more are asked for.
    derandomize="OUTBOX_TEST_WORLDS" not in os.environ,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("OUTBOX_TEST_WORLDS", "20")),
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
)


def explore(places: Mapping[int, Place], way: Right, seen: Counter[str], how: settings) -> None:
    """Let hypothesis look for a world that breaks a promise."""

    class Here(Worlds):
        def __init__(self) -> None:
            super().__init__(places, way, seen)

    run_state_machine_as_test(Here, settings=how)


def test_every_world_ends_at_the_databases_state(places: Mapping[int, Place]) -> None:
    """No loss, no duplicate, no older state after a newer, whatever happens; and everything does happen."""
    seen: Counter[str] = Counter()
    explore(places, Right(), seen, SETTINGS)
    sys.stdout.write(f"{dict(seen)}\n")
    for what in (
        "a cut",
        "a late entry",
        "a zombie is fenced",
        "a dead letter",
        "a dead letter is mended",
        "a slot is pruned",
        "positions are lost",
        "a fail-over",
        "an adoption",
    ):
        assert seen[what], f"it never came to {what}"


def test_an_adoption_that_is_lost_in_its_turn(places: Mapping[int, Place]) -> None:
    """The second one must still go above the ids of the first timeline: a reader drops what is not newer."""
    world = Worlds(places, Right(), Counter())
    world.begin(shards=1, batch_rows=100, collapse=False)
    world.writer_writes_and_commits(writer=0, numbers=[(0, "changes"), (0, "changes"), (0, "changes")])
    world.relays_step(steps=6)
    for _ in range(2):
        world.fail_over(lost=3, pooled=True)
        world.relays_step(steps=6)
    world.writer_writes_and_commits(writer=0, numbers=[(0, "changes")])
    world.relays_step(steps=6)
    ids = [record.id for record in world.kafka.topic]
    world.teardown()
    assert ids == sorted(set(ids)), ids


class GreatestId(Right):
    """`id > last`: what commits late with a smaller id is never read."""

    def read(self, place: Place, reader: Reader, position: Position, wanted: Callable[..., Any]) -> Batch:
        by_id = replace(position, point=Point(None, position.point.anchor, position.point.removed_id))
        return replace(reader.read(by_id, wanted), position=position)


class NoAnchor(Right):
    """Nobody looks whether what was published is still there."""

    def read(self, place: Place, reader: Reader, position: Position, wanted: Callable[..., Any]) -> Batch:
        batch = super().read(place, reader, position, wanted)
        return replace(batch, head=replace(batch.head, anchor_found=True))


class Forgets(Right):
    """Pruning does not record the greatest id that it removes: a start from nothing brings an old state back."""

    def pruned(self, place: Place) -> None:
        place.admin.execute("UPDATE outbox.settings SET removed_id = 0")


class TwoSteps(Right):
    """The position is committed outside of the transaction of the messages."""

    at_once = False


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (GreatestId(), "its last record"),
        (NoAnchor(), "is published|its last record|had the states"),
        (Forgets(), "its last record"),
        (TwoSteps(), "is published|had the states"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Right) else "",
)
def test_wrong_ways_are_found(places: Mapping[int, Place], way: Right, words: str) -> None:
    """One rule left out, and some world breaks a promise."""
    quick = settings(SETTINGS, max_examples=100, phases=[Phase.generate])
    with pytest.raises(Wrong, match=words):
        explore(places, way, Counter(), quick)
