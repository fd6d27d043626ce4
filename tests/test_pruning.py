"""What seems old, since a clock jumped, is not pruned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from outbox.config import Config
from outbox.position import Anchor, Point, Position, Snapshot, start
from outbox.pruning import Pruned, prune_ring
from outbox.schema import bell_key

pytestmark = pytest.mark.postgres

DAY = 86_400.0


def everything(connection: psycopg.Connection) -> Position:
    """A position that has published all that there is, without an anchor, which would pin a slot."""
    (xmax,) = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchone() or (0,)
    return start("test", 0, "t", 1, None, 1, 0).advanced(Point(Snapshot(xmax, xmax), None, 10**6), None)


def write(connection: psycopg.Connection, *, slot: int, age: str) -> None:
    """An entry, at what the server's clock says."""
    connection.execute(
        "INSERT INTO outbox.entries (type, key, state, slot, created_at)"
        " VALUES ('thing', 'k', '{}', %s, clock_timestamp() - %s::interval)",
        [slot, age],
    )


@pytest.fixture
def url(make_outbox: Callable[..., str]) -> str:
    """An outbox that retains a day."""
    return make_outbox(retention="1 day")


def prune(url: str, *, now: Callable[[], float] = time.time) -> dict[int, Pruned]:
    """Prune the ring; by slot what became of it, but for empty ones."""
    with psycopg.connect(url, autocommit=True) as connection:
        found = prune_ring(Config(database_url=url), [everything(connection)], now=now)
        return {one.slot: one for one in found if one.reason != "empty"}


def test_entries_that_were_written_while_the_clock_was_set_back_are_as_young_as_those_before(url: str) -> None:
    """Ids tell the order: an entry is not older than one with a smaller id."""
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=1, age="3 days")
        write(connection, slot=5, age="5 minutes")
        write(connection, slot=2, age="1 day 3 minutes")
        write(connection, slot=5, age="1 minute")
    found = prune(url)
    assert {slot: (one.pruned, one.reason) for slot, one in found.items()} == {
        1: (True, None),
        2: (False, "retained"),
        5: (False, "retained"),
    }


def test_nothing_is_pruned_while_a_history_is_replayed(url: str) -> None:
    """It publishes older states before newer ones, and must come to these."""
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=1, age="3 days")
        connection.execute("INSERT INTO outbox.requests (kind) VALUES ('history')")
    found = prune(url)
    assert (found[1].pruned, found[1].reason) == (False, "is replayed: request 1")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT outbox.report(1, 0::smallint, '{}')")
    assert prune(url)[1].pruned


def test_an_entry_of_the_future_keeps_only_its_own_slot(url: str) -> None:
    """Somebody's hand, or a clock that was set forward: it says nothing of those after it."""
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=1, age="-1000 days")
        write(connection, slot=2, age="3 days")
    assert {slot: one.pruned for slot, one in prune(url).items()} == {1: False, 2: True}


def test_a_slot_is_old_when_both_clocks_say_so(url: str) -> None:
    """The database's that jumped a day ahead; then this machine's; then neither."""
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=1, age="25 hours")
    reason = prune(url, now=lambda: time.time() - DAY)[1].reason
    assert reason is not None
    assert "database's clock, which is 86400 s ahead" in reason
    assert prune(url, now=lambda: time.time() + 30 * DAY)[1].pruned
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=2, age="23 hours")
    assert prune(url, now=lambda: time.time() + 30 * DAY)[2].reason == "retained"


def test_a_position_whose_anchor_is_not_there_prunes_nothing(url: str) -> None:
    """The database lost its tail: what bears the ids and transaction ids of the lost entries only looks published."""
    with psycopg.connect(url, autocommit=True) as connection:
        write(connection, slot=1, age="3 days")
        write(connection, slot=2, age="2 days")
        rows = connection.execute(
            "SELECT id, xid::text::bigint, (extract(epoch FROM created_at) * 1000000)::bigint FROM outbox.entries"
        ).fetchall()
        number, xid, created_us = max(rows)
        known = everything(connection)

        def reasons(anchor: Anchor) -> dict[int, str | None]:
            point = Point(known.point.snapshot, anchor)
            found = prune_ring(Config(database_url=url), [replace(known, point=point)], dry_run=True)
            return {one.slot: one.reason for one in found if one.reason != "empty"}

        there = reasons(Anchor(number, xid, created_us, 0))
        assert there[1] is None
        assert "holds the anchor" in (there[2] or "")
        assert set(reasons(Anchor(number, xid + 1, created_us, 0)).values()) == {
            "the anchor of shard 0 is gone: the log is to be adopted first"
        }


def test_two_that_prune_do_not_wait_for_each_other(url: str) -> None:
    """The second leaves it to the first."""
    with psycopg.connect(url, autocommit=True) as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('prune', %s))", [bell_key("outbox")])
        with psycopg.connect(url, autocommit=True) as other:
            write(other, slot=2, age="3 days")
        assert prune(url)[2].reason == "somebody else is pruning"


def test_a_slot_waits_for_whoever_may_hold_an_older_entry_and_for_nobody_else(url: str) -> None:
    """No transaction id tells: the open one here has the newest, and nothing after it has ended."""
    with (
        psycopg.connect(url) as early,
        psycopg.connect(url) as late,
        psycopg.connect(url) as other,
    ):
        other.execute("CREATE TABLE other (n int)")
        early.execute("SELECT pg_current_xact_id()")
        write(late, slot=5, age="4 days")
        write(early, slot=1, age="3 days")
        early.commit()
        for _ in range(2):
            assert "sealed" in (prune(url)[1].reason or "")
        late.commit()
        assert prune(url)[1].pruned
