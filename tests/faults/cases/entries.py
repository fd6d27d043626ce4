"""What the entries themselves do: stay open, are pruned, are refused."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg

from faults.cases.copies import lose_tail
from faults.load import TYPES, Load
from faults.scene import Outcome, Relay, Say, Scene
from relays import eventually, must


def open_transactions(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Transactions that stay open, and prepared ones that another session ends: only their own entries wait."""
    seconds = []
    with Scene(directory, "open", doorbell=False, poll_interval="0.2") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        with psycopg.connect(scene.url()) as late:
            scene.change(late, "late")
            with psycopg.connect(scene.url()) as connection:
                for number in range(5):
                    scene.change(connection, f"prepared-{number}")
                    connection.execute(f"PREPARE TRANSACTION 'p{number}'")
                    connection.commit()
            for _ in range(5):
                load.wait_written(10)
                seconds.append(scene.seconds_until_published())
            with psycopg.connect(scene.url(), autocommit=True) as other:
                for number in range(5):
                    other.execute(f"{'ROLLBACK' if number % 2 else 'COMMIT'} PREPARED 'p{number}'")
            load.wait_written(10)
            say("prepared transactions ended")
            late.commit()
        load.stop()
        yield Outcome(
            "a transaction open all the time, five prepared", 6, scene.settle(relay), seconds, unit="transactions"
        )


def pruned(
    directory: Path, times: int, say: Say, *, spoil: Callable[[Scene], None] = lambda _: None
) -> Iterator[Outcome]:
    """Pruning under load with a slow relay, and what is published late; one slot locked while the next is not.

    Then the positions are lost. `spoil`: what a test breaks in the product.
    """
    with _ring(directory, "pruned") as scene, scene.load(writers=3, pause=0.1) as load:
        spoil(scene)
        relay = scene.relay(batch_rows=15)
        relay.wait_said("relay.holds")
        _keep_a_late_one(scene, load, relay)
        relay = scene.relay(batch_rows=15)
        relay.wait_said("relay.holds")
        emptied, longest = _prune_out_of_order(scene, load, times, say, relay)
        seconds = [scene.seconds_until_published()]
        load.stop()
        notes = (
            f"with a lock timeout of {LOCK_TIMEOUT:.0f} s an insert into the slot that was waited for took "
            f"{longest * 1000:.0f} ms at the most, one of the load {load.slowest * 1000:.0f} ms"
        )
        yield Outcome("a slot is pruned under load, another is locked", emptied, scene.settle(relay), seconds, notes)
        scene.lose_positions()
        yield Outcome("the positions topic is lost after pruning out of order", 1, scene.settle())
        last = scene.relay()
        last.wait_said("relay.holds")
        for type_name in TYPES:
            must(scene.env(), "replay", "--type", type_name)
        yield Outcome("all that is retained is replayed after pruning out of order", 1, scene.settle(last))


def pruned_and_failed_over(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The server's tail is lost after slots were pruned out of order: what pruning went past stays left out."""
    for number in range(times):
        with _ring(directory, f"pruned-fail-over-{number}") as scene, scene.load(writers=3, pause=0.1) as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            _prune_out_of_order(scene, load, 2, say, relay)
            seconds = [lose_tail(scene, load, [relay], promote=True)]
            load.stop()
            yield Outcome("fail-over after pruning out of order", 1, scene.settle(relay), seconds)


def _keep_a_late_one(scene: Scene, load: Load, relay: Relay) -> None:
    """An entry below the anchor whose transaction ended only after the relay did grows old: it is not removed."""
    with psycopg.connect(scene.url()) as late:
        scene.change(late, "late", type_name="every")
        (its_slot,) = late.execute("SELECT slot FROM outbox.entries WHERE key = 'late'").fetchone() or (0,)
        with psycopg.connect(scene.url(), autocommit=True) as connection:
            now = "SELECT outbox.slot_of(clock_timestamp()) NOT IN (%s, (%s + 1) %% 12)"
            eventually(lambda: connection.execute(now, [its_slot] * 2).fetchone() == (True,), what="the clock goes on")
        load.hold()
        scene.seconds_until_published()
        # A batch of its own: the position is not that of a cut, which would hold everything since its beginning.
        scene.put("the anchor")
        scene.seconds_until_published()
        relay.send(signal.SIGTERM)
        assert relay.wait() == 0

    def looked_at() -> bool:
        slots = _prune(scene)
        return any(
            (slot["slot"] == its_slot and slot["pruned"])
            or (slot["reason"] or "").startswith("shard 0 has not published")
            for slot in slots
        )

    eventually(looked_at, what="its slot is old enough to be pruned")
    load.release()


LOCK_TIMEOUT = 3.0
SLACK = 2.0
"""What an insert may take beside a lock timeout, seconds, on a machine that is busy."""
PATIENCE = 20.0
"""Of a writer that is blocked, seconds: so long would it wait if pruning had no lock timeout."""


def _ring(directory: Path, name: str) -> Scene:
    # Of the ring's twelve seconds four are kept: some slots are old at any time.
    return Scene(directory, name, retention="10 seconds", kept="4 seconds")


def _prune(scene: Scene) -> list[dict[str, Any]]:
    slots: list[dict[str, Any]] = json.loads(must(scene.env(lock_timeout=LOCK_TIMEOUT), "prune", "--json"))["slots"]
    return slots


def _prune_out_of_order(scene: Scene, load: Load, times: int, say: Say, relay: Relay) -> tuple[int, float]:
    """Prune until so many slots were emptied, and one was locked meanwhile; the emptied, the longest insert, seconds.

    A reader stays in the oldest slot: the next ones are pruned before it. While its lock is waited for the owner
    inserts into it. Every other time the relay stands still, until the slots that it has not published are old as well:
    they are kept, and the one that holds its anchor.
    """
    emptied = locked = contended = behind = rounds = 0
    longest = 0.0
    deadline = time.monotonic() + 120 + 25 * times
    with ThreadPoolExecutor(1) as pool:
        while emptied < times or not (locked and contended and behind):
            found = f"{emptied} slots were emptied, {locked} locked, {contended} contended, {behind} pinned"
            assert time.monotonic() < deadline, found
            rounds += 1
            if rounds % 2 == 0:
                behind += _prune_without(scene, relay)
            with psycopg.connect(scene.url()) as reader, psycopg.connect(scene.url()) as writer:
                row = reader.execute(
                    "SELECT slot FROM outbox.entries GROUP BY slot ORDER BY max(created_at) LIMIT 1"
                ).fetchone()
                # It holds a lock on all of them now; only that of the oldest is to stay.
                reader.rollback()
                oldest = int(row[0]) if row else 0
                reader.execute(f"SELECT count(*) FROM outbox.entries_{oldest}".encode())
                pruning = pool.submit(_prune, scene)
                while not (waited_for := _is_waited_for(writer, oldest)) and not pruning.done():
                    pass
                if waited_for:
                    longest = max(longest, _insert_into(scene, writer, oldest))
                    contended += 1
                    # The reader still is where it was: the writer did not wait for it.
                    reader.execute("SELECT 1")
                for slot in pruning.result(60):
                    emptied += bool(slot["pruned"])
                    locked += slot["reason"] == "locked by an open transaction"
            load.wait_written(5)
            say(f"pruned: {emptied} slots of {times}, {locked} times one was locked, {contended} times waited for")
    assert longest < LOCK_TIMEOUT + SLACK, f"an insert waited for {longest:.1f} s; pruning waits for {LOCK_TIMEOUT} s"
    assert load.slowest < LOCK_TIMEOUT + SLACK, f"an entry took {load.slowest:.1f} s to be inserted"
    return emptied, longest


def _prune_without(scene: Scene, relay: Relay) -> bool:
    """Stop the relay and prune until an old slot is kept because of it; whether one was pinned."""
    relay.send(signal.SIGSTOP)
    try:

        def kept() -> list[str]:
            reasons = [slot["reason"] or "" for slot in _prune(scene)]
            return [
                reason for reason in reasons if reason.startswith(("holds the anchor", "shard 0 has not published"))
            ]

        return any(
            reason.startswith("holds the anchor") for reason in eventually(kept, seconds=60, what="a slot is kept")
        )
    finally:
        relay.send(signal.SIGCONT)


def _is_waited_for(connection: psycopg.Connection, slot: int) -> bool:
    """Whether pruning waits for a slot's lock."""
    connection.rollback()
    found = connection.execute(
        "SELECT FROM pg_locks WHERE relation = %s::regclass AND mode = 'AccessExclusiveLock' AND NOT granted",
        [f"outbox.entries_{slot}"],
    ).fetchone()
    return found is not None


def _insert_into(scene: Scene, connection: psycopg.Connection, slot: int) -> float:
    """Insert into a slot that is not the clock's, as the owner may; how long that took, seconds."""
    connection.execute(f"SET LOCAL statement_timeout = '{PATIENCE:.0f} s'".encode())
    began = time.monotonic()
    scene.change(connection, "beside the clock", slot=slot)
    connection.commit()
    return time.monotonic() - began


def refused(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Records that the broker refuses, several among innocent ones and in two topics: exactly those are dead-lettered.

    Then what refused them is mended, a retry is asked for, and they are published, too.
    """
    seconds = []
    limit = "message.timestamp.before.max.ms"
    with Scene(directory, "refused", batch_rows="500") as scene:
        for type_name in ("wide", "every"):
            must(scene.env(), "types", "change", type_name, "--topic-setting", f"{limit}=3600000")
        must(scene.env(), "topics", "apply", "--yes")
        with scene.load() as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            guilty: set[tuple[str, str]] = set()
            for number in range(times):
                load.wait_written(10)
                with psycopg.connect(scene.url()) as connection:
                    for place in range(30):
                        type_name = ("wide", "every")[place % 2]
                        bad = place % 7 == 0
                        key = f"{'guilty' if bad else 'innocent'}-{number}-{place}"
                        # Too old for the topic, or larger than it takes; the others lie in the same batches.
                        scene.change(
                            connection,
                            key,
                            type_name=type_name,
                            age="2 hours" if bad and place % 3 else "0",
                            padding=1_200_000 if bad and not place % 3 else 0,
                        )
                        if bad:
                            guilty.add((type_name, key))
                seconds.append(scene.seconds_until_published())
                say(f"refused: {len(guilty)} records in {number + 1} of {times} rounds")
            found = {(x["type"], x["key"]) for x in json.loads(must(scene.env(), "dead-letters", "list", "--json"))}
            assert found == guilty, found ^ guilty
            for type_name in ("wide", "every"):
                must(scene.env(), "types", "change", type_name, "--max-bytes", "3000000")
                must(scene.env(), "types", "change", type_name, "--topic-setting", f"{limit}={2**63 - 1}")
            must(scene.env(), "topics", "apply", "--yes")
            must(scene.env(), "dead-letters", "retry", "--all", "--yes")
            eventually(lambda: json.loads(must(scene.env(), "dead-letters", "list", "--json")) == [], seconds=60)
            load.stop()
        notes = "those alone were dead-lettered, and published after the limits were mended and a retry was asked for"
        yield Outcome("records are refused among others", len(guilty), scene.settle(relay), seconds, notes)
