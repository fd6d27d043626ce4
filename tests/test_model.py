"""The promise, explored: every interleaving of small worlds around the relay's own code; what breaks without a rule.

Each wrong way is the same world with one rule left out. It must fail, and the shortest way to its failure is printed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from model.explore import BACKFILL, Found, Rules, entry, explore
from model.holder import TYPE, TYPES
from model.world import SYSTEM, Commit, Database, Kafka, Row, Transaction, World, Writer
from outbox.batch import Batch
from outbox.hold import Hold
from outbox.position import Position, start
from outbox.request import Found as Sourced
from outbox.request import Page


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """A relay says much in a hundred thousand worlds."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def world(*programs: str, database: Database | None = None, **more: Any) -> World:
    """A world of writers; how many of each misfortune may come."""
    shards = more.get("shards", 1)
    kafka = Kafka(positions=(None,) * shards, producers=("",) * shards, late=(None,) * shards)
    return World(database or Database(), kafka, tuple(Writer(program) for program in programs), **more)


ONE = [("r", 0)]
BESIDE = [("r", 0), ("s", 0)]
SHARDS = [("r0", 0), ("r1", 1)]


def right(found: Found, *, least: int) -> None:
    """No promise was broken, and there was something to explore."""
    assert found.problem is None, str(found)
    assert found.states >= least, str(found)
    assert found.ends > 0


def wrong(found: Found, *words: str) -> None:
    """A promise was broken, in these words; how is printed."""
    sys.stdout.write(f"{found}\n")
    assert found.problem is not None, f"nothing is wrong: {found}"
    assert all(word in found.problem for word in words), found.problem


# -- writers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "programs",
    [
        ("A.", "A.", "A."),
        ("xA.", "A.", "A!"),
        ("xA.", "xB.", "A."),
        ("xAB.", "B!", "A."),
        ("AB.", "AB.", "xB."),
        ("A(B)B.", "xB.", "A!"),
        ("A.A.", "xB.", "x!"),
        ("xA.", "A.B.", "B."),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("batch_rows", [1, 2])
def test_three_writers_with_early_and_late_xids(programs: Sequence[str], batch_rows: int) -> None:
    """Commit order is neither id order nor xid order; nothing is lost, doubled or stale, cut or not."""
    right(explore(world(*programs), ONE, Rules(batch_rows), begun=1), least=90)


class GreatestId(Rules):
    """`id > last`: what commits late with a smaller id is never read."""

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        rows = [row for row in database.visible if row.id > position.point.floor]
        return Batch(position, database.head(position), TYPES, [entry(row) for row in rows], None)


class XidBelowHorizon(Rules):
    """In the order of transaction ids, below the oldest that runs: an early one may hold the newer state."""

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        anchor = position.point.anchor
        last = (anchor.xid, anchor.id) if anchor else (0, 0)
        horizon = min((*database.running, database.completed + 1))
        rows = sorted(
            (row for row in database.visible if (row.xid, row.id) > last and row.xid < horizon),
            key=lambda row: (row.xid, row.id),
        )
        head = database.head(position)
        top = replace(head.top, id=rows[-1].id, xid=rows[-1].xid) if rows and head.top else anchor
        entries = [entry(row) for row in rows]
        return Batch(position, replace(head, top=top, anchor_found=True), TYPES, entries, None)


class CutByXid(Rules):
    """The difference of two snapshots, cut by transaction id. The place in the cut is (xid, id), as one number."""

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        def place(row: Row) -> int:
            return row.xid * 1000 + row.id

        done, to = (position.cut.last_id, position.cut.to) if position.cut else (0, database.head(position).point)
        rows = sorted(
            (
                row
                for row in database.visible
                if not position.point.published(row.id, row.xid) and to.published(row.id, row.xid) and place(row) > done
            ),
            key=place,
        )[: self.batch_rows]
        entries = [entry(row)._replace(id=place(row)) for row in rows]
        last_id = entries[-1].id if len(entries) >= self.batch_rows else None
        return Batch(position, database.head(position), TYPES, entries, last_id)


class NoAnchor(Rules):
    """A snapshot alone."""

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        seen = position.point.snapshot
        rows = [row for row in database.visible if seen is None or not seen.sees(row.xid)]
        head = replace(database.head(position), anchor_found=True)
        return Batch(position, head, TYPES, [entry(row) for row in rows], None)


def test_wrong_the_greatest_id_loses_what_commits_late() -> None:
    """Two writers are enough."""
    wrong(explore(world("A.", "B."), ONE, GreatestId()), "last record none")


def test_wrong_the_order_of_xids_puts_an_older_state_last() -> None:
    """An early transaction id, a later change."""
    wrong(explore(world("A.", "xA."), ONE, XidBelowHorizon(2)), "its last record 1")


def test_wrong_a_cut_by_xid_puts_an_older_state_last() -> None:
    """The same, at the cut."""
    wrong(explore(world("A.", "xA."), ONE, CutByXid(1)), "published after")


# -- PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [("A!", "A.", "xB."), ("A~", "B.", "xA!"), ("A~", "A.", "B~")], ids=" ".join)
def test_a_crash_that_hands_transaction_ids_out_again(programs: Sequence[str]) -> None:
    """Also with asynchronous commits among synchronous ones: nothing is published that the crash loses."""
    right(explore(world(*programs, crashes=1), ONE, begun=1), least=90)


def test_wrong_a_position_without_the_anchor_misses_what_bears_an_old_xid() -> None:
    """What was aborted left nothing on disk: its transaction id comes again, and counts as seen."""
    wrong(explore(world("C.", "B!", "A.", crashes=1), ONE, NoAnchor(), begun=1), "last record none")


def test_wrong_without_waiting_for_the_disk_a_lost_entry_has_been_published() -> None:
    """An asynchronous commit is visible before it is durable."""

    class NoFlush(Rules):
        def flush(self, database: Database, lsn: str) -> Database:
            return database

    wrong(explore(world("A~", crashes=1), ONE, NoFlush(), begun=1), "the crash has lost it")


@pytest.mark.parametrize("programs", [("A.", "A.", "B."), ("AB.", "xA.")], ids=" ".join)
def test_a_fail_over_that_loses_the_tail_is_adopted_once(programs: Sequence[str]) -> None:
    """Whether a connection shows it or a pooler hides it."""
    right(explore(world(*programs, failovers=1), ONE, begun=1), least=90)


def test_a_fail_over_with_two_shards_and_a_kill() -> None:
    """The epoch lets one shard adopt; the other starts anew from what it made."""
    right(explore(world("AB.", failovers=1, pooled=(True,), shards=2, kills=1), SHARDS, begun=2), least=90)


def test_a_batch_of_the_lost_tail_that_is_committed_after_another_shard_adopted() -> None:
    """Whoever adopted did not know of it; its shard sees that the new ids are not above what it published."""
    committed = Database(
        rows=(Row(1, 10, 0, "A", (1, 1), 1),),
        next_id=2,
        next_xid=11,
        completed=10,
        commits=(Commit(10, (("A", (1, 1)),)),),
        flushed=1,
    )
    tail = world("B.B.", database=committed, failovers=1, tail=2, pooled=(True,), shards=2)
    right(explore(tail, SHARDS, Rules(2), begun=2), least=90)


def test_a_relay_that_is_killed_while_it_adopts() -> None:
    """Before it, after it, and before it has said so in Kafka."""
    right(explore(world("A.", "A.", failovers=1, kills=1), ONE, begun=1), least=90)


class Hidden(Rules):
    """The anchor is looked up on connect only."""

    def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
        batch = super().read(database, shard, position, wanted)
        seen = position.reached.snapshot
        if database.generation > 1 or seen is None:
            return batch
        # Nor is it looked whether transaction ids run backwards.
        snapshot = max(batch.head.snapshot, seen, key=lambda one: one.xmax)
        return replace(batch, head=replace(batch.head, anchor_found=True, snapshot=snapshot))


def test_wrong_an_anchor_looked_up_on_connect_only_is_fooled_by_a_pooler() -> None:
    """The connection lives on, the database behind it is another."""
    wrong(explore(world("A.", "A.", failovers=1), ONE, Hidden(), begun=1), "its last record")


def test_wrong_an_adoption_without_new_ids_publishes_what_consumers_must_drop() -> None:
    """Not newer than what the lost timeline had published."""

    class OldIds(Rules):
        def adopt(self, database: Database, expected_epoch: int, positions: Sequence[Position]) -> Database | None:
            adopted = super().adopt(database, expected_epoch, positions)
            if adopted is None or adopted is database:
                return adopted
            ids = iter(sorted(row.id for row in database.visible))
            rows = tuple(row._replace(id=next(ids)) for row in adopted.rows)
            return replace(adopted, rows=rows, next_id=database.next_id)

    wrong(explore(world("A.", "A.", failovers=1), ONE, OldIds(), begun=1), "published")


def test_wrong_an_adoption_without_the_lock_leaves_a_newer_state_with_a_smaller_id() -> None:
    """A writer that was open keeps the id that it has."""

    class NoLock(Rules):
        def adopt(self, database: Database, expected_epoch: int, positions: Sequence[Position]) -> Database | None:
            settled = replace(database, running=frozenset())
            adopted = super().adopt(settled, expected_epoch, positions)
            if adopted is None or adopted is settled:
                return database
            open_rows = tuple(row for row in database.rows if row.xid in database.running)
            return replace(adopted, rows=(*adopted.rows, *open_rows), running=database.running)

    wrong(explore(world("A.", "B.", "A.", failovers=1), ONE, NoLock(), begun=1), "published twice")


def test_wrong_an_adoption_without_the_epoch_happens_twice() -> None:
    """Two shards see the same loss."""

    class NoEpoch(Rules):
        def adopt(self, database: Database, expected_epoch: int, positions: Sequence[Position]) -> Database | None:
            return super().adopt(database, database.epoch, positions)

    wrong(explore(world("A.", "B.", failovers=1, shards=2), SHARDS, NoEpoch(), begun=2), "adopted twice")


# -- the relay and Kafka ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [("A.", "xA."), ("AB.", "A!", "xB.")], ids=" ".join)
def test_a_relay_that_is_killed_between_any_two_of_its_calls(programs: Sequence[str]) -> None:
    """The position in Kafka is the truth."""
    right(explore(world(*programs, kills=2), ONE, begun=1), least=90)


def test_a_commit_whose_answer_is_lost() -> None:
    """It was done, or was not, or is done later: before somebody takes the shard over, or never."""
    right(explore(world("AB.", "xA.", lost_answers=2, kills=1), ONE, begun=1), least=90)


def test_a_stall_beyond_the_transactions_time_limit() -> None:
    """Fenced, with nobody else there: the relay goes on."""
    right(explore(world("AB.", "xA.", stalls=2), ONE, begun=1), least=90)


def test_a_zombie_beside_its_successor() -> None:
    """Whoever wakes up last is fenced; nothing is doubled, and one is left."""
    right(explore(world("A.", "xA."), BESIDE, begun=1), least=90)


@pytest.mark.parametrize(
    ("programs", "relays"), [(("AB.", "xA."), ONE), (("A.A.",), BESIDE)], ids=["alone", "beside a successor"]
)
def test_a_transaction_that_must_be_aborted(programs: Sequence[str], relays: Sequence[tuple[str, int]]) -> None:
    """A fresh producer goes on from the position."""
    right(explore(world(*programs, aborts=2), relays, Rules(2), begun=1), least=90)


@pytest.mark.parametrize("batch_rows", [1, 2])
def test_records_that_are_refused(batch_rows: int) -> None:
    """Named, suspected or neither, once and again: what is not refused is published, once and in order."""
    right(explore(world("AB.", "A.", refusals=2), ONE, Rules(batch_rows), begun=1), least=90)


def test_a_refusal_beside_a_successor() -> None:
    """Whoever takes a fresh producer looks whether the shard is still its own."""
    right(explore(world("A.A.", refusals=1), BESIDE, Rules(2), begun=1), least=90)


def test_a_topics_limit_that_changes_beside_a_successor() -> None:
    """It takes a fresh producer as well, and between a read and its publishing."""
    right(explore(world("A.A.", limits=1), BESIDE, begun=1), least=90)


def renews_blindly(hold: Hold) -> None:
    """Go on from what is in memory, whoever was fenced by it."""
    assert hold.kafka is not None
    hold.kafka.renew()


@pytest.mark.parametrize("misfortunes", [{"refusals": 1}, {"limits": 1}], ids=str)
def test_wrong_a_fresh_producer_without_a_look_at_the_position_doubles(
    misfortunes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fences the successor, and publishes again what that one has published."""
    monkeypatch.setattr(Hold, "renew", renews_blindly)
    wrong(explore(world("A.A.", **misfortunes), BESIDE, begun=1), "published")


class TwoSteps(Rules):
    """The position is committed outside of the transaction of the messages."""

    def commit(self, kafka: Kafka, shard: int, transaction: Transaction) -> Sequence[Kafka]:
        return [kafka.write(transaction), kafka.commit(shard, transaction)]


def test_wrong_a_position_outside_of_the_transaction_doubles() -> None:
    """Killed in between, the messages are there and the position is not."""
    wrong(explore(world("A."), ONE, TwoSteps()), "published twice")


# -- pruning, lost positions ---------------------------------------------------------------------------------------


def test_slots_that_are_pruned_out_of_order_before_the_positions_are_lost() -> None:
    """An old state of a key whose newer one is gone does not come back."""
    right(explore(world("A.A.B.", prunes=1, lost_positions=1, kills=1), ONE, begun=1), least=90)


def test_slots_that_are_pruned_before_a_fail_over() -> None:
    """An adoption leaves out what pruning went past, too."""
    right(explore(world("A.A.", "B.", prunes=1, failovers=1), ONE, begun=1), least=90)


def test_what_bears_the_ids_of_a_lost_tail_is_not_pruned_as_published() -> None:
    """A database that lost its tail hands its ids and transaction ids out again."""
    right(explore(world("AB.", "A.", failovers=1, prunes=1), ONE, begun=1), least=90)


def test_wrong_a_start_that_forgets_the_greatest_id_removed_brings_an_old_state_back() -> None:
    """The slot with the newer state is gone, the one with the older is not."""

    class Forgets(Rules):
        def look(self, database: Database, position: Position) -> Any:
            return replace(super().look(database, position), removed_id=0)

        def read(self, database: Database, shard: int, position: Position, wanted: Callable[..., Any]) -> Batch:
            batch = super().read(database, shard, position, wanted)
            return replace(batch, head=replace(batch.head, removed_id=0))

    wrong(explore(world("A.A.B.", prunes=1, lost_positions=1, kills=1), ONE, Forgets()), "its last record")


# -- requests ------------------------------------------------------------------------------------------------------


def with_a_dead_letter(*programs: str, **more: Any) -> World:
    """Entry 1 of A could not be published; a retry of it is asked for."""
    database = Database(
        rows=(Row(1, 5, 0, "A", (1, 1), 1),),
        commits=(Commit(5, (("A", (1, 1)),)),),
        flushed=1,
        next_id=2,
        requests=(7,),
    )
    begun = start("m", 0, "before", 1, SYSTEM, 1, 0).advanced(
        database.head(start("m", 0, "", 1, SYSTEM, 1, 0)).point, None
    )
    made = world(*programs, database=database, **more)
    kafka = replace(made.kafka, positions=(begun.encode(),), dead=frozenset({((TYPE, "A"), 1)}))
    return replace(made, kafka=kafka)


@pytest.mark.parametrize("batch_rows", [1, 2])
def test_a_retry_beside_a_cut_backlog(batch_rows: int) -> None:
    """What it publishes is read in a batch's own snapshot, and a cut backlog takes none."""
    right(explore(with_a_dead_letter("A.A.", "B."), ONE, Rules(batch_rows), begun=1), least=90)


def test_wrong_a_request_taken_in_a_cut_batch_is_followed_by_older_states() -> None:
    """The rest of the backlog is older than what the request has published."""

    class Hasty(Rules):
        def takes_requests(self, batch: Batch) -> bool:
            return True

    wrong(explore(with_a_dead_letter("B.A.A."), ONE, Hasty(1)), "published")


# -- backfills -----------------------------------------------------------------------------------------------------


def with_a_backfill(*programs: str, **more: Any) -> World:
    """A and B were there before the outbox; a backfill is asked for."""
    database = Database(before=(("A", (1, 1)), ("B", (1, 1))), requests=(BACKFILL,))
    return world(*programs, database=database, **more)


@pytest.mark.parametrize("batch_rows", [1, 2])
@pytest.mark.parametrize("programs", [("A.",), ("A.A.", "B."), ("AB.", "A.")])
def test_a_backfill_beside_writers(batch_rows: int, programs: Sequence[str]) -> None:
    """Its page is of the batch's own snapshot: each key once, never older than what follows, beside a cut backlog."""
    right(explore(with_a_backfill(*programs), ONE, Rules(batch_rows)), least=30)


@pytest.mark.parametrize("more", [{"kills": 2}, {"lost_answers": 1}, {"aborts": 1}, {"refusals": 1}], ids=str)
def test_a_backfill_that_is_interrupted_goes_on_behind_its_last_key(more: dict[str, int]) -> None:
    """How far it is lies in the position, in the transaction that published its page."""
    right(explore(with_a_backfill("A.", **more), ONE, Rules(1)), least=50)


def test_wrong_a_page_taken_in_a_cut_batch_is_followed_by_older_states() -> None:
    """The rest of the backlog is older than the page."""

    class Hasty(Rules):
        def takes_requests(self, batch: Batch) -> bool:
            return True

    wrong(explore(with_a_backfill("B.A."), ONE, Hasty(1)), "published")


def test_wrong_a_page_of_another_snapshot_is_older_than_what_was_published() -> None:
    """Read before the batch, outside of its transaction: what is committed in between is published first."""

    class Stale(Rules):
        def page(self, database: Database, shard: int, page: Page, found: Sourced) -> Sourced:
            before = replace(database, commits=database.commits[:-1])
            return super().page(before, shard, page, found)

    wrong(explore(with_a_backfill("A.A."), ONE, Stale(2)), "published after")
